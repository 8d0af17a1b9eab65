"""What a store gives: blobs, which are read by range from any number of threads."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from pathlib import Path

from millrace.core.registry import lookup

Buffer = bytes | memoryview


class StoreError(OSError):
    """A read that failed for a reason of the store's: missing, shorter than it was, not answering. Says which URL."""


class Blob(ABC):
    """One file or object that does not change while it is open.

    Made with its URL; raises `StoreError` when there is none. `size` is in bytes.
    """

    url: str
    size: int

    @abstractmethod
    def read(self, start: int, length: int) -> bytes:
        """Bytes [start, start + length), all of them; callable from several threads at once.

        Raises:
            StoreError: the range cannot be read, or lies beyond the end.
        """

    def view(self, start: int, length: int) -> Buffer:
        """As `read`, without the last copy where the store can."""
        return self.read(start, length)

    def readinto(self, start: int, buffer: memoryview) -> None:
        """As `read`, as many bytes as `buffer` has."""
        buffer[:] = self.view(start, len(buffer))

    @abstractmethod
    def version(self) -> str:
        """Changes when the content may have changed: modification time, ETag."""

    def path(self) -> Path | None:
        """Where it lies on a local disk, if it does."""
        return None

    def open(self, buffer_size: int = 2**20) -> io.BufferedReader:
        """A seekable file over `read`, for libraries that want one; asks a store for `buffer_size` bytes at once."""
        path = self.path()
        return open(path, "rb") if path else io.BufferedReader(_File(self), buffer_size)

    @abstractmethod
    def close(self) -> None:
        """Give back what is open; a second call does nothing."""

    def forget(self) -> None:
        """Drop what is kept of it on this node, so that the next read is the store's own."""
        return None

    def check_range(self, start: int, stop: int) -> None:
        """Raise `StoreError` where [start, stop) is not within it."""
        if not 0 <= start <= stop <= self.size:
            raise StoreError(f"{self.url} has {self.size} bytes: there are none from {start} to {stop}")

    def __enter__(self) -> Blob:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _File(io.RawIOBase):
    def __init__(self, blob: Blob) -> None:
        self._blob, self._at = blob, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._blob.size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._blob.size - self._at))
        self._blob.readinto(self._at, memoryview(buffer)[:count])  # io gives a bytearray too
        self._at += count
        return count


def scheme_of(url: str) -> str:
    """The scheme before "://"; "file" for a plain path."""
    scheme, mark, _ = url.partition("://")
    return scheme.lower() if mark else "file"


def open_blob(url: str | Path) -> Blob:
    """Open a path or a URL; what is not on a local disk is read through the node's cache.

    Raises:
        UserError: a scheme that no store is registered for.
        StoreError: nothing there, or not readable.
    """
    from millrace.data import STORES

    blob: Blob = lookup(STORES, scheme_of(str(url)), "store")(str(url))
    if blob.path():
        return blob
    from millrace.data.stores.cache import cached

    return cached(blob)
