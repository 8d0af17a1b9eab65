"""Remote blobs through the node's cache: a page is fetched once per node, and kept as an entry of `Folder`."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from millrace.core.units import fmt_size
from millrace.data.stores.base import Blob, Buffer, StoreError
from millrace.data.stores.local import LocalBlob
from millrace.data.stores.node import Folder

PAGE = 2**20  # bytes
_RUN = 8  # pages fetched by one request, at most
_WAIT = 200.0  # seconds for which another process may hold a page's lock, before it is read without the cache
_INFLATE_WAIT = 3600.0
_INFLATE_STEP = 8 * 2**20
_NOTHING = memoryview(bytearray())


@lru_cache(maxsize=1)
def node_cache() -> Folder:
    """The folder that the environment names, for all blobs of this process."""
    return Folder()


def key_of(blob: Blob) -> str:
    """Names a blob's content in the cache."""
    return hashlib.sha256(f"{blob.url}\n{blob.version()}\n{blob.size}".encode()).hexdigest()[:32]


def cached(blob: Blob, folder: Folder | None = None) -> Blob:
    """`blob` through the cache; itself where its store cannot tell versions apart, or no page fits."""
    folder = folder or node_cache()
    return CachedBlob(blob, folder) if blob.version() and folder.limit > PAGE else blob


class CachedBlob(Blob):
    """Reads pages of `remote` from `folder`, and fetches and adds those that are missing."""

    def __init__(self, remote: Blob, folder: Folder) -> None:
        self.remote, self._folder = remote, folder
        self.url, self.size, self._key = remote.url, remote.size, key_of(remote)

    def version(self) -> str:
        """The remote's."""
        return self.remote.version()

    def open(self, buffer_size: int = 2**16) -> io.BufferedReader:
        """As `Blob.open`; the store is asked for pages anyway."""
        return super().open(buffer_size)

    def close(self) -> None:
        """Close the remote; its pages stay."""
        self.remote.close()

    def forget(self) -> None:
        """Remove its pages, and its inflated content."""
        self._folder.forget(self._key)

    def read(self, start: int, length: int) -> bytes:
        """Read from pages, and from the store where one is missing; raises as it does."""
        number, at = divmod(start, PAGE)
        if 0 < length <= PAGE - at and start >= 0 and start + length <= self.size:
            part = self._folder.read(self._key, number, self._length(number), (at, at + length))
            if part is not None:
                return part
        return bytes(self.view(start, length))

    def view(self, start: int, length: int) -> Buffer:
        """As `read`."""
        self.check_range(start, start + length)
        buffer = memoryview(bytearray(length))
        self.readinto(start, buffer)
        return buffer

    def readinto(self, start: int, buffer: memoryview) -> None:
        """As `read`."""
        stop = start + len(buffer)
        self.check_range(start, stop)
        numbers = range(start // PAGE, -(-stop // PAGE)) if len(buffer) else range(0)
        spans = {n: (max(start - n * PAGE, 0), min(stop - n * PAGE, PAGE)) for n in numbers}
        parts = {n: buffer[n * PAGE + span[0] - start :][: span[1] - span[0]] for n, span in spans.items()}
        absent = [n for n in numbers if not self._readinto(n, spans[n][0], parts[n])]
        for run in _runs(absent):
            fetched = self._fetch(run, _WAIT)
            if fetched is None:
                buffer[:] = self.remote.view(start, len(buffer))
                return
            for n in run:
                if n in fetched:
                    parts[n][:] = fetched[n][slice(*spans[n])]
                elif not self._readinto(n, spans[n][0], parts[n]):  # evicted as soon as it was there
                    parts[n][:] = self.remote.view(n * PAGE + spans[n][0], len(parts[n]))

    def _readinto(self, number: int, start: int, part: memoryview) -> bool:
        return self._folder.readinto(self._key, number, self._length(number), start, part)

    def _length(self, number: int) -> int:
        return min(PAGE, self.size - number * PAGE)

    def missing(self, ranges: np.ndarray) -> list[range]:
        """Runs of pages that hold the `ranges`, (offset, length) in rows, and are not here."""
        first, last = ranges[:, 0] // PAGE, (ranges.sum(axis=1) - 1).clip(0, self.size - 1) // PAGE
        wide = [range(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True) if b > a]
        numbers = sorted({*last.tolist(), *itertools.chain.from_iterable(wide)})
        return list(_runs(n for n in numbers if not self._folder.has(self._key, n)))

    def fetch(self, run: range) -> None:
        """Bring pages here, unless another reader is about to; raises as the store does."""
        self._fetch(run, 0.0)

    def _fetch(self, run: range, wait: float) -> dict[int, Buffer] | None:
        """Fetch pages of `run` that nobody has added meanwhile, by requests of all that lie side by side.

        None if nothing can be cached, or others hold them for longer than `wait` seconds.
        """
        what = f"{self.url} (bytes {run.start * PAGE} to {run.stop * PAGE}, which another reader of this node fetches)"
        fetched: dict[int, Buffer] = {}
        with self._folder.locked(self._key, run, wait, what) as held:
            if not held:
                return None
            for missing in _runs(n for n in run if not self._readinto(n, 0, _NOTHING)):
                start = missing.start * PAGE
                data = memoryview(self.remote.view(start, min(missing.stop * PAGE, self.size) - start))
                for number in missing:
                    fetched[number] = page = data[number * PAGE - start :][:PAGE]
                    self._folder.add(self._key, number, page)
        return fetched


def _runs(numbers: Iterable[int]) -> Iterator[range]:
    """Contiguous ranges of at most `_RUN` of `numbers`, which ascend."""
    run = range(0)
    for number in numbers:
        if run and number == run.stop and len(run) < _RUN:
            run = range(run.start, number + 1)
            continue
        if run:
            yield run
        run = range(number, number + 1)
    if run:
        yield run


class _InflatedBlob(LocalBlob):
    """A file of the cache, which may be evicted: it has no path to be opened by once more."""

    def __init__(self, path: str, blob: Blob, folder: Folder) -> None:
        super().__init__(path)
        self.url, self._version, self._folder, self._key = blob.url, blob.version(), folder, key_of(blob)

    def path(self) -> None:  # type: ignore[override]
        """None: the file's name may be gone while it is open."""

    def forget(self) -> None:
        """Remove it, so that it is inflated again."""
        self._folder.forget(self._key)


class _DamagedError(StoreError):
    """What was read cannot be decompressed."""


def inflate(blob: Blob, compression: Literal["gz", "zst"], max_bytes: int, folder: Folder | None = None) -> Blob:
    """The decompressed content of `blob`, written into the cache once per node, in bounded memory.

    Raises:
        StoreError: damaged, cut short, larger than `max_bytes` when decompressed, or larger than the cache.
    """
    folder = folder or node_cache()
    key = key_of(blob)
    what = f"{blob.url}, which another process decompresses"
    if found := _open_inflated(blob, folder, key):
        return found
    with folder.locked(key, wait=_INFLATE_WAIT, what=what) as held:
        if found := _open_inflated(blob, folder, key):
            return found
        if not held:
            raise StoreError(f"cannot decompress {blob.url}: {folder.root} cannot be written; set MILLRACE_CACHE")
        try:
            return _write_inflated(blob, compression, max_bytes, folder)
        except _DamagedError:
            if blob.path() is not None:
                raise
            return _write_inflated(blob, compression, max_bytes, folder)  # it may have been damaged on the way


def _open_inflated(blob: Blob, folder: Folder, key: str) -> Blob | None:
    try:
        os.utime(folder.path(key))
        return _InflatedBlob(folder.path(key), blob, folder)
    except OSError:
        return None


def _write_inflated(blob: Blob, compression: str, max_bytes: int, folder: Folder) -> Blob:
    key, reserved, size = key_of(blob), 0, 0
    temporary = folder.writing(key)
    try:
        with open(temporary, "wb") as file:
            for part in _inflated(blob, compression):
                size += len(part)
                if size > max_bytes:
                    raise StoreError(f"{blob.url} is larger than {fmt_size(max_bytes)} when decompressed: refused")
                if size > reserved:
                    if not folder.reserve(_INFLATE_STEP, temporary):
                        raise StoreError(
                            f"{blob.url} does not fit into the cache {folder.root} of {fmt_size(folder.limit)} when "
                            "decompressed; raise MILLRACE_CACHE_SIZE"
                        )
                    reserved += _INFLATE_STEP
                file.write(part)
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
        opened = _InflatedBlob(temporary, blob, folder)
        folder.publish(temporary, key)
    except BaseException as error:
        folder.give_up(key, reserved)
        if isinstance(error, OSError) and not isinstance(error, StoreError):
            raise StoreError(f"cannot decompress {blob.url} into {folder.root}: {error.strerror or error}") from None
        raise
    folder.reserve(size - reserved)
    return opened


def _inflated(blob: Blob, compression: str) -> Iterator[bytes]:
    """Decompressed parts of at most 1 MiB."""
    import pyarrow as pa

    # What is inflated is kept: there is no need to keep the compressed pages too.
    source = blob.remote if isinstance(blob, CachedBlob) else blob
    if not source.size:
        raise StoreError(f"{blob.url} is empty, and no {compression} file")
    with source.open(_INFLATE_STEP) as file:
        stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), {"gz": "gzip", "zst": "zstd"}[compression])
        while part := _next(stream, blob):
            yield part


def _next(stream: Any, blob: Blob) -> bytes:
    try:
        return bytes(stream.read(PAGE))
    except StoreError:
        raise
    except OSError as error:
        raise _DamagedError(f"{blob.url} cannot be decompressed: {error}; write it again") from None
