"""Files on disks that this machine sees."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from millrace.data.stores.base import Blob, StoreError


class LocalBlob(Blob):
    """A file; `url` is its path, or file://PATH."""

    def __init__(self, url: str) -> None:
        self.url = url.removeprefix("file://")
        self._fd = -1
        try:
            self._fd = os.open(self.url, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(self._fd)
        except OSError as error:
            raise StoreError(f"cannot read {self.url}: {error.strerror}") from None
        self.size, self._version = status.st_size, str(status.st_mtime_ns)

    def read(self, start: int, length: int) -> bytes:
        """Read at a place, without a file position that threads would share."""
        parts, at, stop = [], start, start + length
        while at < stop:
            try:
                part = os.pread(self._fd, stop - at, at)
            except OSError as error:
                raise StoreError(f"cannot read {self.url} at byte {at}: {error.strerror}") from None
            if not part:
                raise StoreError(f"{self.url} ends at byte {at}, before byte {stop}: it was cut short")
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def version(self) -> str:
        """Nanoseconds of the last modification."""
        return self._version

    def path(self) -> Path:
        """The file."""
        return Path(self.url)

    def close(self, close: Callable[[int], None] = os.close) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1  # `close` is kept, for `os` is gone when the last are dropped at the very end
        if fd >= 0:
            close(fd)

    def forget(self) -> None:
        """Remove what `inflate` made of it."""
        from millrace.data.stores.cache import key_of, node_cache

        node_cache().forget(key_of(self))

    def __del__(self) -> None:
        self.close()
