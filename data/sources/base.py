"""What a source is: it streams a shard once to index it, and reads any of its samples in place later."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that cannot be decoded; `why` says what and where in the file."""

    why: str


Content = str | np.ndarray | BadSample
"""Text, or token ids (int, shape (n,)) of a tokenised source."""

Place = tuple[int, int]
"""Where a sample lies in its shard: (byte offset, length) or (row group, row)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample met while scanning: its place, its content, and its size in bytes of UTF-8 text."""

    place: Place
    content: Content
    bytes: int


class Source(ABC):
    """Reads shards of one format. Subclass in one file and add one line to `millrace.data.SOURCES`."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        """`columns` names the columns to read: {"text": …}, or {"tokens": …, "bytes": …} when tokenised."""
        self.columns = dict(columns)

    @abstractmethod
    def scan(self, path: Path) -> Iterator[Sample]:
        """Stream every sample in order, in bounded memory.

        Raises:
            UserError: the file is not of this format, or a column is missing.
        """

    @abstractmethod
    def read(self, path: Path, places: Sequence[Place]) -> list[Content]:
        """Read samples at `places` (ascending) in bounded memory beyond the result."""

    def block(self, place: Place) -> int:
        """Number of the block that holds `place`: samples of one block are cheap to read together."""
        return place[0]


def decode(raw: bytes, offset: int = 0) -> str | BadSample:
    """Decode UTF-8; `offset` is where `raw` starts in its file."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadSample(f"not UTF-8 at byte {offset + error.start} ({error.reason}: 0x{raw[error.start]:02x})")


def check_text(text: object) -> str | BadSample:
    """A string that UTF-8 can express (JSON can hold lone surrogates, which it cannot)."""
    if not isinstance(text, str):
        return BadSample(f"the text is {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return BadSample(f"a lone surrogate at character {error.start}")
    return text
