"""Byte ranges of a blob, read together where they lie close: a remote store answers one request, not hundreds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from millrace.data.sources.base import Place
from millrace.data.stores.base import Blob

_GAP = 64 * 2**10  # bytes between two ranges that are cheaper to read than to ask twice
_RUN = 8 * 2**20  # bytes read at once, unless a single range is longer


def read_ranges(blob: Blob, places: Sequence[Place]) -> Iterator[memoryview]:
    """Bytes of each (offset, length) of `places` (ascending), as views that keep a run of at most 8 MiB alive.

    Raises:
        StoreError: as `Blob.read`.
    """
    first = 0
    while first < len(places):
        start, last, stop = places[first][0], first, sum(places[first])
        while last + 1 < len(places) and _near(places[last + 1], start, stop):
            last += 1
            stop = max(stop, sum(places[last]))
        run = memoryview(blob.view(start, stop - start))
        for offset, length in places[first : last + 1]:
            yield run[offset - start : offset - start + length]
        first = last + 1


def _near(place: Place, start: int, stop: int) -> bool:
    return place[0] - stop <= _GAP and sum(place) - start <= _RUN
