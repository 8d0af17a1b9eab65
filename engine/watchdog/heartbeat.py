"""What a rank is at: a few numbers in a memory-mapped file, which cost no system call to write.

Every rank passes the same sections in the same order, so that the count of sections begun tells who is behind.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

SECTIONS = ("start", "first", "step", "collective", "data", "save", "eval")
_LAYOUT = struct.Struct("<qqqd")  # section, step, begun, since


@dataclass(frozen=True)
class Beat:
    """`begun` sections so far, the last of them `section` of `step`, at `since` on this machine's monotonic clock."""

    section: str
    step: int
    begun: int
    since: float


class Heartbeat:
    """Written by the rank; `at` is the last (section, step)."""

    def __init__(self, path: Path) -> None:
        with open(path, "w+b") as file:
            file.truncate(_LAYOUT.size)
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        self._begun = 0
        self.enter("start", 0)

    def enter(self, section: str, step: int) -> None:
        """Begin `section` of `step`; what was before has ended."""
        self.at = section, step
        self._begun += 1
        _LAYOUT.pack_into(self._map, 0, SECTIONS.index(section), step, self._begun, time.monotonic())


def read(path: Path) -> Beat:
    """What the rank is at now. A beat that is being written may be read half: one that matters stands still."""
    with open(path, "rb") as file:
        section, step, begun, since = _LAYOUT.unpack(os.read(file.fileno(), _LAYOUT.size))
    return Beat(SECTIONS[section], step, begun, since)
