"""WebDataset: tar archives whose members of one name with different extensions make a sample."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from millrace.core.errors import UserError
from millrace.data import MODALITIES
from millrace.data.sources.base import (
    MAX_SAMPLE_BYTES,
    BadSample,
    Content,
    Place,
    Sample,
    Source,
    Value,
    text_bytes,
)
from millrace.data.sources.ranges import read_ranges
from millrace.data.sources.tar_headers import Member, TarError, members
from millrace.data.sources.values import PICKLED, check_roles, to_value
from millrace.data.stores.base import Blob

_BLOCK_BITS = 20  # samples whose offsets share a mebibyte form a block
_META = re.compile(r"__[^/]*__($|/)")  # members that WebDataset keeps for itself

Raw = bytes | memoryview


@dataclass(slots=True)
class _Group:
    """Members of one key, side by side; `ends` has their extensions, and the contents of those that are wanted."""

    key: str
    start: int
    end: int = 0
    bad: str | None = None
    ends: dict[str, Raw | None] = field(default_factory=dict)

    def add(self, member: Member, end: str, wanted: bool, load: Callable[[Member], Raw]) -> None:
        """Take a member; its content is loaded only while the sample may still be good."""
        self.end = member.end
        if member.bad:
            self.bad = f"the member '{_short(member.name)}' {member.bad}"
        elif end.rpartition(".")[2] in PICKLED:
            self.bad = f"the member '{_short(member.name)}' is a pickle, which runs code when it is read"
        elif end in self.ends:
            self.bad = f"two members '{_short(member.name)}' with the same extension"
        elif self.end - self.start > MAX_SAMPLE_BYTES:
            self.bad = f"'{_short(self.key)}' has more than {MAX_SAMPLE_BYTES} bytes with all its members"
        if not self.bad:
            self.ends[end] = load(member) if wanted else None


class TarSource(Source):
    """A place is (offset of a sample's first header, bytes through its last member's padding).

    Members belong together when their paths are equal up to the first dot of the base name; the rest, in lower case, is
    the extension (as `webdataset.tariterators` has it). They must lie side by side, as WebDataset writes them. A column
    is an extension, or several in the order of preference: {"image": "jpg;png", "text": "txt"}. Role `tokens` is a
    NumPy file ("npy"). Links, devices, sparse files, pickles and paths that lead elsewhere make a sample bad.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        super().__init__(columns)
        check_roles(columns, ("text", "tokens", *MODALITIES, "bytes"), "a tar archive")
        self._wanted = {
            role: [end.lower().removeprefix(".") for end in re.split(r"[|;]", ends) if end]
            for role, ends in columns.items()
            if role != "bytes"
        }
        self._ends = {end for ends in self._wanted.values() for end in ends}
        for end in self._ends:
            if end.rpartition(".")[2] in PICKLED:
                raise UserError(f"members '.{end}' are pickles, which run code when they are read; they are never read")

    def scan(self, blob: Blob) -> Iterator[Sample]:
        """Stream the archive once; one sample at a time is in memory."""
        seen: set[int] = set()  # hashes of keys
        try:
            with blob.open() as file:

                def fetch(offset: int, length: int) -> bytes:
                    file.seek(offset)
                    return file.read(length)

                for group in self._groups(members(fetch, blob.size, True), lambda m: fetch(m.data, m.size)):
                    if hash(group.key) in seen:
                        group.bad = group.bad or (
                            f"members of '{_short(group.key)}' lie apart; write the archive with sorted names"
                        )
                    seen.add(hash(group.key))
                    content = self._content(group)
                    yield Sample((group.start, group.end - group.start), content, text_bytes(content))
        except TarError as error:
            raise UserError(f"{blob.url} is not a whole tar archive: {error}; write it anew") from None

    def read(self, blob: Blob, places: Sequence[Place]) -> list[Content]:
        """Parse the members in each range; ranges that lie close are read at once."""
        return [self._read(raw, place) for raw, place in zip(read_ranges(blob, places), places, strict=True)]

    def ranges(self, blob: Blob, places: np.ndarray) -> np.ndarray:
        """The places."""
        return places

    def block(self, place: Place) -> int:
        """Samples that start in the same mebibyte."""
        return place[0] >> _BLOCK_BITS

    def _read(self, raw: memoryview, place: Place) -> Content:
        try:
            found = members(lambda at, length: bytes(raw[at : at + length]), len(raw), False)
            (group,) = self._groups(found, lambda m: raw[m.data : m.data + m.size])
        except ValueError as error:  # a TarError, or not one group
            return BadSample(f"no sample lies at byte {place[0]}, {place[1]} bytes long: {error}")
        return self._content(group)

    def _groups(self, found: Iterable[Member], load: Callable[[Member], Raw]) -> Iterator[_Group]:
        group: _Group | None = None
        for member in found:
            if member.name.startswith("__") and _META.match(member.name):
                continue
            folder, slash, base = member.name.rpartition("/")
            stem, dot, end = base.partition(".")
            if not (stem and dot or member.bad):
                continue
            key, end = folder + slash + stem, end.lower()
            if group is None or group.key != key:
                if group:
                    yield group
                group = _Group(key, member.start)
            group.add(member, end, end in self._ends, load)
        if group:
            yield group

    def _content(self, group: _Group) -> Content:
        if group.bad:
            return BadSample(f"byte {group.start}: {group.bad}")
        record: dict[str, Value] = {}
        for role, ends in self._wanted.items():
            end = next((end for end in ends if end in group.ends), None)
            if end is None:
                has = ", ".join(list(group.ends)[:8])
                why = f"'{_short(group.key)}' has no member .{' or .'.join(ends)} beside the others (it has: {has})"
                return BadSample(f"byte {group.start}: {why}")
            value = to_value(role, group.ends[end] or b"")
            if isinstance(value, BadSample):
                return BadSample(f"byte {group.start}: '{_short(group.key)}.{end}': {value.why}")
            record[role] = value
        return record


def _short(name: str) -> str:
    """A name that is fit to be printed."""
    return "".join(c if c.isprintable() else "?" for c in name[:200])
