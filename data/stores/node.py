"""The cache folder of a node: entries up to a limit, shared by all its processes, whenever one of them is killed.

lock          its first 8 bytes are the sum of all entries' sizes; see `Folder.locked`
entries/ab/   complete entries; the time of modification is that of the last use
writing/      entries that whoever holds their lock is writing; renamed when complete
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import xxhash

from millrace.core.console import warn
from millrace.core.units import parse_size
from millrace.data.stores.waiting import waiting

_NUMBERS = 22  # bits of an entry's number within its key
_SUM = 2**62  # the byte of the lock file that guards its content
_LAST = 2**_NUMBERS - 1
_TRAILER = 8
_VERIFIED = 2**16  # entries remembered as sound
_OPEN, _OPEN_SHARE = 64, 2**23  # entries kept open: so many, and at most one for so many bytes of the limit
_OFF = 60.0  # seconds without the cache after it could not be written
_TOUCH = 60.0  # seconds between two records of an entry's use


class _Entry:
    """An entry that was found sound, open until the last thread drops it."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __del__(self) -> None:
        os.close(self._fd)

    def use(self) -> bool:
        """Record the use of it; False where it was removed from the folder meanwhile."""
        status = os.fstat(self._fd)
        if time.time() - status.st_mtime > _TOUCH:
            _touch(self._fd)
        return status.st_nlink > 0

    def read(self, start: int, length: int) -> bytes:
        return os.pread(self._fd, length, start)

    def readinto(self, start: int, buffer: memoryview) -> bool:
        return os.preadv(self._fd, [buffer], start) == len(buffer)


class Folder:
    """The folder `root`, of at most `limit` bytes (None: half of what is free or cached already).

    Nothing here raises `OSError`: what cannot be kept is said once and not kept.
    """

    def __init__(self, root: str | Path | None = None, limit: int | str | None = None) -> None:
        """Defaults: $MILLRACE_CACHE or ~/.cache/millrace/data, and $MILLRACE_CACHE_SIZE (such as "200 GiB").

        Raises:
            UserError: the limit is not a size.
        """
        self.root = os.path.abspath(root or os.environ.get("MILLRACE_CACHE") or Path.home() / ".cache/millrace/data")
        given = limit if limit is not None else os.environ.get("MILLRACE_CACHE_SIZE") or None
        self.limit = 0 if given is None else parse_size(given)
        self._complained, self._off_until = False, 0.0
        self._verified: dict[str, int] = {}
        self._open: dict[str, _Entry] = {}
        self._opening = threading.Lock()
        try:
            self._make()
            if given is None:
                space = os.statvfs(self.root)
                self.limit = (space.f_bavail * space.f_frsize + self._sum()) // 2
            self._sweep()
        except OSError as error:
            self.complain(error)

    def _make(self) -> None:
        for name in ("entries", "writing"):
            os.makedirs(f"{self.root}/{name}", mode=0o700, exist_ok=True)

    def complain(self, error: OSError) -> None:
        """Keep nothing for a minute, and say so once."""
        self._off_until = time.monotonic() + _OFF
        self._open = {}  # removed entries give their space back
        if not self._complained:
            self._complained = True
            why = error.strerror or error
            warn(
                f"the cache {self.root} cannot be written ({why}): reading on without it; MILLRACE_CACHE names another"
            )

    def path(self, key: str, number: int = _LAST) -> str:
        """Where an entry lies; `key` is hexadecimal, and a key's last number is for what is not a page."""
        return f"{self.root}/entries/{key[:2]}/{key}-{number:06x}"

    def read(self, key: str, number: int, length: int, span: tuple[int, int]) -> bytes | None:
        """Bytes [start, stop) of an entry of `length` bytes that `add` wrote; None if it is not there or damaged."""
        try:
            entry = self._entry(key, number, length)
            data = entry.read(span[0], span[1] - span[0]) if entry else b""
        except OSError:
            return None
        return data if entry and len(data) == span[1] - span[0] else None

    def readinto(self, key: str, number: int, length: int, start: int, buffer: memoryview) -> bool:
        """As `read`, from `start` on into `buffer`; False where `read` gives None."""
        try:
            entry = self._entry(key, number, length)
            return entry is not None and entry.readinto(start, buffer)
        except OSError:
            return False

    def has(self, key: str, number: int) -> bool:
        """Whether an entry is there, sound or not."""
        path = self.path(key, number)
        return path in self._open or os.path.exists(path)

    def _entry(self, key: str, number: int, length: int) -> _Entry | None:
        """An entry that is in the folder and sound; a damaged one is removed."""
        path = self.path(key, number)
        entry = self._open.get(path)
        if entry is not None:
            if entry.use():
                return entry
            self._open.pop(path, None)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        entry = _Entry(fd)
        status = os.fstat(fd)
        if self._verified.get(path) != status.st_ino or status.st_size != length + _TRAILER:
            whole = os.pread(fd, length + _TRAILER + 1, 0)
            if len(whole) != length + _TRAILER or whole[length:] != _digest(memoryview(whole)[:length], number):
                os.unlink(path)
                return None
            self._remember(path, status.st_ino)
        entry.use()
        self._keep_open(path, entry)
        return entry

    def _remember(self, path: str, inode: int) -> None:
        if len(self._verified) >= _VERIFIED:
            self._verified.clear()
        self._verified[path] = inode

    def _keep_open(self, path: str, entry: _Entry) -> None:
        """Drop the oldest instead: what was evicted takes space for as long as it is open."""
        with self._opening:
            self._open.pop(path, None)
            while len(self._open) >= max(1, min(_OPEN, self.limit // _OPEN_SHARE)):
                del self._open[next(iter(self._open))]
            if self.limit >= _OPEN_SHARE:
                self._open[path] = entry

    def add(self, key: str, number: int, data: bytes | memoryview) -> None:
        """Keep an entry; the caller holds its lock."""
        temporary, size = self.writing(key, number), len(data) + _TRAILER
        reserved = 0
        try:
            with open(temporary, "wb") as file:
                if not self.reserve(size, temporary):
                    return self.give_up(key, 0, number)
                reserved = size
                file.write(data)
                file.write(_digest(data, number))
                self._remember(self.path(key, number), os.fstat(file.fileno()).st_ino)
            self.publish(temporary, key, number)
        except OSError as error:
            self.give_up(key, reserved, number)
            self.complain(error)

    def writing(self, key: str, number: int = _LAST) -> str:
        """Where an entry is written before it is published; what a killed process left there is overwritten."""
        return f"{self.root}/writing/{key}-{number:06x}"

    def publish(self, temporary: str, key: str, number: int = _LAST) -> None:
        """Make a complete entry visible."""
        path = self.path(key, number)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        os.replace(temporary, path)

    def give_up(self, key: str, count: int, number: int = _LAST) -> None:
        """Remove a half-written entry, for which `count` bytes were reserved."""
        with contextlib.suppress(OSError):
            os.unlink(self.writing(key, number))
        if count:
            self.reserve(-count)

    def forget(self, key: str) -> None:
        """Remove all entries of a key."""
        folder, freed = os.path.dirname(self.path(key)), 0
        with self._opening:
            self._open = {path: entry for path, entry in self._open.items() if key not in path}
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(key):
                    freed += _remove(entry)
        self.reserve(-freed)

    @contextlib.contextmanager
    def locked(
        self, key: str, numbers: range = range(_LAST, _LAST + 1), wait: float = 0.0, what: str = ""
    ) -> Iterator[bool]:
        """Hold the locks of entries; False where they are not to be had within `wait` seconds, or nothing can be kept.

        Entry `number` of `key` is a byte of the file `lock`, and held by a lock on an open file description
        (F_OFD_SETLK, fcntl(2)). The kernel drops it when its holder ends, and it holds between threads too.
        """
        start = (int(key[:10], 16) << _NUMBERS) + numbers.start
        with self._lock(range(start, start + len(numbers)), wait, what) as fd:
            yield fd is not None

    @contextlib.contextmanager
    def _lock(self, numbers: range, wait: float, what: str) -> Iterator[int | None]:
        """The lock file with `numbers` of its bytes locked, or None."""
        if time.monotonic() < self._off_until:
            yield None
            return
        try:
            fd = self._open_lock()
        except OSError as error:
            self.complain(error)
            yield None
            return
        try:
            yield fd if self._acquire(fd, numbers, wait, what) else None
        finally:
            with contextlib.suppress(OSError):
                _set_lock(fd, fcntl.F_UNLCK, numbers)  # a child forked meanwhile has `fd` too
            os.close(fd)

    def _open_lock(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            return os.open(f"{self.root}/lock", flags, 0o600)
        except FileNotFoundError:  # somebody removed the whole folder
            self._make()
            return os.open(f"{self.root}/lock", flags, 0o600)

    def _acquire(self, fd: int, numbers: range, wait: float, what: str) -> bool:
        try:
            if _try_lock(fd, numbers):
                return True
            # Asked again and again rather than waited for: a suspended holder must not stop everybody else.
            end, pause = time.monotonic() + wait, 0.0005
            with waiting(what):
                while time.monotonic() < end:
                    time.sleep(pause)
                    if _try_lock(fd, numbers):
                        return True
                    pause = min(0.005, pause * 1.5)
        except OSError as error:
            self.complain(error)
        return False

    def reserve(self, count: int, temporary: str = "") -> bool:
        """Count `count` bytes more (or less, below zero); False where they do not fit even after eviction.

        The file `temporary` grows by as many, all of them holes: whoever counts anew counts what others have reserved.
        """
        with self._lock(range(_SUM, _SUM + 1), 30.0, f"the cache {self.root}, which another process cleans") as fd:
            if fd is None:
                return False
            try:
                content = os.pread(fd, 8, 0)
                total = int.from_bytes(content, "little") + count
                if len(content) < 8 or total > self.limit:
                    total = self._evict(count) + count
                fits = total <= self.limit
                os.pwrite(fd, max(0, total if fits else total - count).to_bytes(8, "little"), 0)
                if fits and temporary:
                    os.truncate(temporary, os.path.getsize(temporary) + count)
            except OSError as error:
                self.complain(error)
                return False
        return fits

    def _sum(self) -> int:
        with contextlib.suppress(OSError), open(f"{self.root}/lock", "rb") as file:
            return int.from_bytes(file.read(8), "little")
        return 0

    def _evict(self, count: int) -> int:
        """Make room for `count` bytes and a tenth of the limit if need be; return the sum that is left.

        Readers are not asked: an open entry stays readable, and one that vanished is fetched again.
        """
        total = self._sweep()
        entries = sorted(self._entries(), key=lambda entry: entry[0])
        total += sum(size for _, size, _ in entries)
        if total + count > self.limit:
            goal = min(self.limit - count, self.limit * 9 // 10)
            for _, _, entry in entries:
                if total <= goal:
                    break
                total -= _remove(entry)
        return total

    def _entries(self) -> Iterator[tuple[int, int, os.DirEntry[str]]]:
        """(time of last use, size, entry) of all."""
        for folder in os.scandir(f"{self.root}/entries"):
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    yield status.st_mtime_ns, status.st_size, entry

    def _sweep(self) -> int:
        """Remove what killed processes were writing (nobody holds its lock); return the size of what others write."""
        total = 0
        for entry in os.scandir(f"{self.root}/writing"):
            key, _, number = entry.name.partition("-")
            with contextlib.suppress(ValueError, FileNotFoundError):  # not ours; published meanwhile
                at = int(number, 16)
                with self.locked(key, range(at, at + 1)) as held:
                    total += 0 if held and _remove(entry) else entry.stat().st_size
        return total


def _set_lock(fd: int, kind: int, numbers: range) -> None:
    # struct flock: type, whence, start, length, process (0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, numbers.start, len(numbers), 0))


def _try_lock(fd: int, numbers: range) -> bool:
    try:
        _set_lock(fd, fcntl.F_WRLCK, numbers)
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: somebody holds it
        return False
    return True


def _digest(data: bytes | memoryview, number: int) -> bytes:
    return xxhash.xxh3_64_digest(data, seed=number)


def _touch(fd: int) -> None:
    with contextlib.suppress(OSError):  # a read-only cache serves too
        os.utime(fd)


def _remove(entry: os.DirEntry[str]) -> int:
    """Remove a file; return its size, or 0 if it was gone."""
    try:
        size = entry.stat().st_size
        os.unlink(entry.path)
    except OSError:
        return 0
    return size
