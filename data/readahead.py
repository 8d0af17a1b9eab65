"""Reading ahead: what the next windows need comes to the node's cache before it is asked for, many requests at a time.

Nothing depends on it. What fails or is stopped here is read, and named, by whoever needs it.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from millrace.core.errors import UserError
from millrace.data.corpus import Corpus
from millrace.data.index import ascending
from millrace.data.reader import ShardReader
from millrace.data.stores.base import StoreError, scheme_of
from millrace.data.stores.cache import PAGE, CachedBlob, node_cache

_REQUESTS = 16  # under way at once
_ASKED = 2**16  # needs that are remembered
_IN_FLIGHT = 64 * 2**20  # bytes of them, which are held in memory


class ReadAhead:
    """Fetches what reading samples takes; does nothing for local shards."""

    def __init__(self, reader: ShardReader, in_flight: int = _IN_FLIGHT) -> None:
        """`in_flight`: bytes that may be under way at once; a single request always may."""
        self._reader, self._corpus = reader, reader.corpus
        size = sum(shard.size for manifest in self._corpus.manifests for shard in manifest.shards)
        self._bytes_per_sample = size / self._corpus.samples
        self.room = node_cache().limit // 4  # bytes of the cache that may hold what is not needed yet
        self._limit, self._flying, self._closed = in_flight, 0, False
        self._changed = threading.Condition()
        self._asked: dict[int, set[tuple[int, ...]]] = {}  # of each shard, `_count` in all, while `_fetched` bytes came
        self._fetched = self._count = 0
        self._pool = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="millrace-ahead")

    def needs(self, samples: int, blocks: int) -> float:
        """Bytes of the cache that so many samples of so many blocks take at most, for blocks begin within pages."""
        return samples * self._bytes_per_sample + min(samples, 2 * blocks) * PAGE

    def expect(self, samples: np.ndarray) -> None:
        """Begin to fetch what `samples` (any order, with repetitions) need and the cache has not."""
        if self._fetched > self.room or self._count > _ASKED:
            self._asked, self._fetched, self._count = {}, 0, 0
        with contextlib.suppress(UserError):
            for number, places in self._new(ascending(samples)):
                if _is_remote(self._corpus, number):
                    self._submit(self._open, number, places)

    def close(self) -> None:
        """Begin no more requests, and wait for those that are under way."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, task: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # closed meanwhile
            self._pool.submit(task, *arguments)

    def _new(self, samples: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(shard, places) of those of `samples` that need something for which nobody asked yet.

        Most windows need little that is new. What the cache has dropped since it was asked for is fetched by whoever
        reads it, until all is forgotten here.
        """
        shard, places = self._corpus.shard_of(samples), self._corpus.lookup(samples, ("at", "extent")).T
        borders = (shard[1:] != shard[:-1]).nonzero()[0] + 1
        for start, stop in itertools.pairwise([0, *borders.tolist(), len(samples)]):
            number, here = int(shard[start]), places[start:stop]
            needs = list(map(tuple, self._reader.source(number).needs(here).tolist()))
            asked = self._asked.setdefault(number, set())
            if new := set(needs) - asked:
                asked |= new
                self._count += len(new)
                yield number, here[[need in new for need in needs]]

    def _open(self, number: int, places: np.ndarray) -> None:
        """Open a shard, fetch the first run of pages that are missing, and leave the others to other threads."""
        missing = self._missing(number, places)
        for one in missing[1:]:
            self._submit(self._fetch, *one)
        for one in missing[:1]:
            self._fetch(*one)

    def _missing(self, number: int, places: np.ndarray) -> list[tuple[CachedBlob, range]]:
        with contextlib.suppress(StoreError, UserError):
            source, blob = self._reader.opened(number)
            if isinstance(blob, CachedBlob):
                return [(blob, run) for run in blob.missing(source.ranges(blob, places))]
        return []

    def _fetch(self, blob: CachedBlob, run: range) -> None:
        size = len(run) * PAGE
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._flying or self._flying + size <= self._limit)
            if self._closed:
                return
            self._flying += size
            self._fetched += size
        try:
            with contextlib.suppress(StoreError):
                blob.fetch(run)
        finally:
            with self._changed:
                self._flying -= size
                self._changed.notify_all()


def _is_remote(corpus: Corpus, number: int) -> bool:
    manifest, place = corpus.shard(number)
    return scheme_of(manifest.shard_url(place)) != "file"


def read_ahead(reader: ShardReader) -> ReadAhead | None:
    """For a corpus of which some shard is remote; None otherwise."""
    remote = any(scheme_of(shard.url) != "file" for m in reader.corpus.manifests for shard in m.shards)
    return ReadAhead(reader) if remote else None
