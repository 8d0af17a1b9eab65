"""Memory of decoded samples: kept by the allocator from one to the next."""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h
_KEPT = 64 * 2**20
_FROM_HEAP = 32 * 2**20  # the most that glibc takes


def keep_freed_memory() -> None:
    """Have this process keep up to 64 MiB of freed memory (in each arena) instead of giving it back at once.

    Otherwise glibc returns the pixels of every image to the kernel, which has to clear the pages of the next: a third
    of the time that decoding takes. Does nothing with another C library.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _FROM_HEAP)
        libc.mallopt(_TRIM_THRESHOLD, _KEPT)
