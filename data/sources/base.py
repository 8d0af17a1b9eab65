"""What a source is: it streams a shard once to index it, and reads any of its samples in place later."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from millrace.data.stores import cache
from millrace.data.stores.base import Blob

MAX_SAMPLE_BYTES = 64 * 2**20  # a line, member or file beyond it is refused, not read into memory


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that cannot be decoded; `why` says what and where in the file."""

    why: str


Value = str | bytes | np.ndarray
"""Text; an encoded image or sound; token ids (integers, shape (n,))."""

Record = dict[str, Value]
"""A sample's values by role: `text`, `tokens`, `image`, `audio`."""

Content = Record | BadSample

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
        """`columns` names the column or field of each role: {"text": "body"}, {"image": "jpg", "text": "txt"}.

        A tokenised source has {"tokens": …, "bytes": …}.
        """
        self.columns = dict(columns)

    @abstractmethod
    def scan(self, blob: Blob) -> Iterator[Sample]:
        """Stream every sample in order, in bounded memory.

        Raises:
            UserError: the file is not of this format, or a column is missing.
            StoreError: it cannot be read.
        """

    @abstractmethod
    def read(self, blob: Blob, places: Sequence[Place]) -> list[Content]:
        """Read samples at `places` (ascending) in bounded memory beyond the result.

        Raises:
            StoreError: as `Blob.read`.
        """

    def tokens(self, blob: Blob, places: np.ndarray) -> list[np.ndarray] | None:
        """Token ids at `places`, int64 of shape (n, 2), where `read` would give nothing else and none is bad.

        So that short documents need not become records one by one; None by default, and then `read` is asked.

        Raises:
            UserError: a damaged shard, of which `read` says more.
            StoreError: as `Blob.read`.
        """
        return None

    def ranges(self, blob: Blob, places: np.ndarray) -> np.ndarray:
        """(offset, length) in `blob`, int64 of shape (n, 2), of what reading `places` (of the same shape) takes.

        So that it can be fetched ahead; none by default. May read from `blob`, and raises as `read` does.
        """
        return places[:0]

    def needs(self, places: np.ndarray) -> np.ndarray:
        """What the `ranges` of each of `places` depend on, int64 of shape (n, 2): those alike have the same pages.

        First and last page of a byte range, unless a place is something else.
        """
        first = places[:, :1]
        return np.concatenate([first, first + places[:, 1:] - 1], axis=1) // cache.PAGE

    def block(self, place: Place) -> int:
        """Number of the block that holds `place`: samples of one block are cheap to read together."""
        return place[0]


def checksum(record: Record) -> int:
    """XXH3 (64 bits, as a signed integer) over the values in the order of their roles.

    Kept for every sample, so that a flipped bit is found whatever part of a shard is read, and at no cost at start.
    """
    if len(record) == 1:
        (value,) = record.values()
        raw = value.encode() if isinstance(value, str) else value
        return xxhash.xxh3_64_intdigest(raw) - 2**63  # type: ignore[arg-type]
    digest = xxhash.xxh3_64()
    for role in sorted(record):
        value = record[role]
        digest.update(value.encode() if isinstance(value, str) else value)  # type: ignore[arg-type]
    return digest.intdigest() - 2**63


def decode(raw: bytes | memoryview, offset: int = 0) -> str | BadSample:
    """Decode UTF-8; `offset` is where `raw` starts in its file."""
    try:
        return str(raw, "utf-8")
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


def text_bytes(content: Content) -> int:
    """Bytes of UTF-8 text in a sample, for bits per byte."""
    text = content.get("text") if isinstance(content, dict) else None
    return len(text.encode()) if isinstance(text, str) else 0
