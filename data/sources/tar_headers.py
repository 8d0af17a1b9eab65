"""Headers of tar archives: ustar, GNU and pax (POSIX.1-2017, "pax Interchange Format"; GNU tar manual, appendix D).

`tarfile` parses from a file and makes an object with 20 attributes for a member; here a header is a few slices of
bytes in memory. Nothing is ever written to a disk, so no name can do harm; those that elsewhere could are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

HEADER = 512
_MAX_EXTENDED = 2**20  # bytes of a long name or of pax records
_KINDS = {
    b"1": "is a hard link",
    b"2": "is a symbolic link",
    b"3": "is a character device",
    b"4": "is a block device",
    b"6": "is a FIFO",
    b"S": "is a sparse file",
    b"M": "is a part of a file that began in another volume",
}

Fetch = Callable[[int, int], bytes]
"""Gives `length` bytes at an offset, fewer at the end."""


class TarError(ValueError):
    """The archive is damaged or cut short; says where."""


@dataclass(slots=True)
class Member:
    """A member: its (extended) headers begin at `start`, its content at `data`, the next member at `end`."""

    start: int
    data: int
    end: int
    size: int
    name: str
    bad: str | None  # why it is refused


def members(fetch: Fetch, stop: int, whole: bool) -> Iterator[Member]:
    """Members whose headers lie in [0, stop), folders left out.

    `whole` says that this is all of an archive: checksums of headers are verified, and it must have its end mark.

    Raises:
        TarError: what lies there is not a header, or reaches beyond `stop`.
    """
    start = at = 0
    long_name, pax = "", dict[str, str]()
    while at < stop:
        header = fetch(at, HEADER)
        if len(header) < HEADER:
            raise TarError(f"it is cut short in the header at byte {at}")
        if not header[0] and not any(header):
            break
        if whole:
            _verify(header, at)
        kind, data = header[156:157], at + HEADER
        size = _size(header, pax, at)
        end = data + -(-size // HEADER) * HEADER
        if end > stop:
            raise TarError(f"the member at byte {at} has {size} bytes and reaches beyond the end: it is cut short")
        if kind in b"LKxXg":
            if size > _MAX_EXTENDED:
                raise TarError(f"the extended header at byte {at} has {size} bytes, more than {_MAX_EXTENDED}")
            raw = fetch(data, size)
            if kind == b"L":
                long_name = _text(raw)
            elif kind == b"g":
                _check_global(_pax(raw, at), at)
            elif kind != b"K":
                pax = _pax(raw, at)
        else:
            name = pax.get("path") or long_name or _name(header)
            if kind != b"5" and not (kind == b"\0" and name.endswith("/")):
                yield Member(start, data, end, size, name, _refusal(kind, name, pax))
            start, long_name, pax = end, "", {}
        at = end
    if start < at and (long_name or pax):
        raise TarError(f"the extended header at byte {start} belongs to no member: it is cut short")
    if whole:
        _check_end(fetch, at, stop)


def _size(header: bytes, pax: dict[str, str], at: int) -> int:
    """Bytes of content. Links and devices have none, whatever their size says."""
    if header[156] in b"123456":
        return 0
    if header[156] in b"S" and header[482]:
        raise TarError(f"the member at byte {at} is a sparse file of many pieces; write the archive without --sparse")
    return int(pax["size"]) if "size" in pax else _number(header[124:136], at)


def _refusal(kind: bytes, name: str, pax: dict[str, str]) -> str | None:
    if kind not in b"\x0007":
        return _KINDS.get(kind, f"is of the unknown type {kind!r}")
    if pax and any(key.startswith("GNU.sparse.") for key in pax):
        return _KINDS[b"S"]
    if name.startswith("/"):
        return "is named by an absolute path"
    if ".." in name and ".." in name.split("/"):
        return "is named by a path with '..'"
    return None


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[345] and header[257:263] == b"ustar\0":
        return f"{_text(header[345:500])}/{name}"
    return name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes, at: int) -> int:
    """An octal number, or (GNU) a binary one marked by its first bit."""
    try:
        value = int.from_bytes(field[1:]) if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        value = -1
    if value < 0:
        raise TarError(f"the header at byte {at} has the number {field!r}, which is none")
    return value


def _verify(header: bytes, at: int) -> None:
    """The sum of a header's bytes, where the sum itself counts as eight spaces."""
    if sum(header) - sum(header[148:156]) + 8 * 0x20 != _number(header[148:156], at):
        raise TarError(f"at byte {at} there is no tar header: the checksum differs")


def _pax(raw: bytes, at: int) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE` with a line feed at the end, which LENGTH counts too."""
    found: dict[str, str] = {}
    place = 0
    while place < len(raw) and raw[place]:
        digits, space, _ = raw[place : place + 20].partition(b" ")
        end = place + int(digits) if space and digits.isdigit() else 0
        key, mark, value = raw[place + len(digits) + 1 : end - 1].partition(b"=")
        if not mark or not place < end <= len(raw):
            raise TarError(f"the pax header at byte {at} has a damaged record")
        found[_text(key)] = value.decode("utf-8", "surrogateescape")
        place = end
    size = found.get("size", "0")
    if not (size.isascii() and size.isdigit() and len(size) < 20):
        raise TarError(f"the pax header at byte {at} has the size {size[:40]!r}, which is none")
    return found


def _check_global(pax: dict[str, str], at: int) -> None:
    """Refuse what would change members that are read without what came before them."""
    for key in pax:
        if key in ("path", "size") or key.startswith("GNU.sparse."):
            raise TarError(f"the global pax header at byte {at} sets '{key}' of all members")


def _check_end(fetch: Fetch, at: int, stop: int) -> None:
    """Nothing but zeros, and at least one block of them."""
    if at >= stop:
        raise TarError(f"it has no end mark at byte {at}: it is cut short")
    while at < stop:
        block = fetch(at, 2**20)
        if block.count(0) < len(block) or not block:
            raise TarError(f"there is more behind its end mark, near byte {at}: archives were joined, or it is damaged")
        at += len(block)
