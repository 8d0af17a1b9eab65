"""What every source must satisfy, whatever its format: shared by the tests of this folder."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from millrace.core.errors import UserError
from millrace.core.registry import lookup
from millrace.data import SOURCES
from millrace.data.sources.base import BadSample, Content, Sample, Source, text_bytes
from millrace.data.stores.base import Blob, StoreError
from millrace.data.stores.local import LocalBlob


class Remote(Blob):
    """A blob that lies nowhere on a local disk, and counts what is read of it."""

    def __init__(self, path: Path) -> None:
        self._local = LocalBlob(str(path))
        self.url, self.size = str(path), self._local.size
        self.requests = self.bytes = 0

    def read(self, start: int, length: int) -> bytes:
        self.requests += 1
        self.bytes += length
        return self._local.read(start, length)

    def version(self) -> str:
        return self._local.version()

    def close(self) -> None:
        self._local.close()


def make(kind: str, columns: Mapping[str, str]) -> Source:
    made: Source = lookup(SOURCES, kind, "source")(columns)
    return made


def plain(content: Content) -> Any:
    """A content that can be compared: token ids as a list."""
    if isinstance(content, BadSample):
        return content
    return {role: value.tolist() if isinstance(value, np.ndarray) else value for role, value in content.items()}


def contents(samples: Iterable[Sample]) -> list[Any]:
    return [plain(sample.content) for sample in samples]


def scan(kind: str, columns: Mapping[str, str], path: Path) -> list[Sample]:
    with LocalBlob(str(path)) as blob:
        return list(make(kind, columns).scan(blob))


def agree(kind: str, columns: Mapping[str, str], path: Path, expected: Sequence[Any]) -> list[Sample]:
    """A scan sees `expected`, from a local disk and a store; any samples that are read later are the same."""
    samples = scan(kind, columns, path)
    assert contents(samples) == list(expected)
    assert contents(make(kind, columns).scan(Remote(path))) == list(expected)
    places = [sample.place for sample in samples]
    assert places == sorted(set(places))
    blocks = [make(kind, columns).block(place) for place in places]
    assert blocks == sorted(blocks)
    for sample in samples:
        if kind != "parquet" and "bytes" not in columns:
            assert sample.bytes == text_bytes(sample.content)
    draw, source = random.Random(len(samples)), make(kind, columns)
    subsets = [list(range(len(samples))), *([i] for i in range(min(5, len(samples))))]
    subsets += [sorted(draw.sample(range(len(samples)), draw.randint(0, len(samples)))) for _ in range(5)]
    for blob in (LocalBlob(str(path)), Remote(path)):
        for subset in subsets:
            read = source.read(blob, [places[i] for i in subset])
            assert [plain(content) for content in read] == [expected[i] for i in subset]
    return samples


def fails(kind: str, columns: Mapping[str, str], path: Path, good: Sequence[Sample]) -> bool:
    """Whether a scan of a damaged shard ends in an error or a bad sample; reading must do so too, or give what was."""
    whole = contents(good)
    for place, was in zip([sample.place for sample in good], whole, strict=True):
        try:
            with LocalBlob(str(path)) as blob:
                (got,) = make(kind, columns).read(blob, [place])
            assert isinstance(got, BadSample) or plain(got) == was or set(got) == set(was)
        except (UserError, StoreError):
            pass
    try:
        found = contents(scan(kind, columns, path))
    except (UserError, StoreError):
        return True
    return any(isinstance(content, BadSample) for content in found)


def cut_everywhere(kind: str, columns: Mapping[str, str], path: Path, cuts: Iterable[int]) -> list[int]:
    """The lengths to which the shard can be cut without an error or a bad sample in a scan."""
    good, raw = scan(kind, columns, path), path.read_bytes()
    unnoticed = []
    for cut in sorted({c for c in cuts if 0 <= c < len(raw)}):
        path.write_bytes(raw[:cut])
        if not fails(kind, columns, path, good):
            unnoticed.append(cut)
    path.write_bytes(raw)
    return unnoticed
