"""Contents of samples, compared with their checksums.

Nothing here depends on how many ranks there are: a rank asks for the documents of its own rows only.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import xxhash

from millrace.core.errors import UserError
from millrace.core.registry import lookup
from millrace.data import SOURCES
from millrace.data.corpus import Corpus
from millrace.data.index import Entries
from millrace.data.manifest import Manifest
from millrace.data.sources.base import BadSample, Content, Place, Source, checksum
from millrace.data.sources.recent import Recent
from millrace.data.stores.base import Blob, StoreError, open_blob

_OPEN_FILE, _OPEN_WEIGHT = 64, 8192  # a local shard that is kept open weighs as much as so many remote ones
_ALTERED = BadSample("is not what was prepared: its checksum differs; the shard was altered or is damaged")


class ShardReader:
    """Reads samples of a corpus; callable from several threads at once."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._tokens_alone = all({*manifest.columns, "bytes"} == {"tokens", "bytes"} for manifest in corpus.manifests)
        self._sources: dict[tuple[Manifest, str], Source] = {}
        self._blobs: Recent[Blob] = Recent(_OPEN_WEIGHT, lambda blob: _OPEN_FILE if blob.path() else 1)
        self._lock = threading.Lock()

    def read(self, samples: np.ndarray) -> list[Content]:
        """Contents of `samples` (unique, ascending), read in the order in which they lie.

        What was read is compared with the manifest's checksum; what differs is read once more from where it lies, and
        is bad if it still does.

        Raises:
            UserError: a shard is missing or has another size.
        """
        entries = self.corpus.entries(samples)
        shards, firsts = np.unique(self.corpus.shard_of(samples), return_index=True)
        contents: list[Content] = []
        for number, start, stop in zip(shards.tolist(), firsts, [*firsts[1:], len(samples)], strict=True):
            here = np.arange(start, stop)
            found = self._read(number, entries, here)
            checks = entries.check[here].tolist()
            wrong = [i for i, check in enumerate(checks) if _differs(found[i], check)]
            if wrong:
                self._forget(number)
                for i, content in zip(wrong, self._read(number, entries, here[wrong]), strict=True):
                    altered = not isinstance(content, BadSample) and _differs(content, checks[i])
                    found[i] = _ALTERED if altered else content
            contents += found
        return contents

    def tokens(self, samples: np.ndarray) -> list[np.ndarray] | None:
        """Token ids of `samples` (unique, ascending) where they hold nothing else and are all what was prepared.

        None otherwise: `read` then says which are bad, and why.

        Raises:
            UserError: as `read`.
        """
        if not self._tokens_alone:
            return None
        at, extent, checks = self.corpus.lookup(samples, ("at", "extent", "check"))
        places, shards = np.stack([at, extent], axis=1), self.corpus.shard_of(samples)
        found: list[np.ndarray] = []
        for part in np.split(np.arange(len(samples)), np.flatnonzero(np.diff(shards)) + 1):
            number = int(shards[part[0]])
            with self._named(number):
                source, blob = self.opened(number)
                try:
                    tokens = source.tokens(blob, places[part])
                except UserError:
                    return None
            if tokens is None:
                return None
            found += tokens
        digests = np.fromiter(map(xxhash.xxh3_64_intdigest, found), np.uint64, len(found))  # type: ignore[arg-type]
        return found if np.array_equal((digests - np.uint64(2**63)).view(np.int64), checks) else None

    def opened(self, number: int) -> tuple[Source, Blob]:
        """What reads shard `number`, and the shard, opened.

        Raises:
            StoreError: it cannot be opened.
            UserError: it has another size than the manifest says.
        """
        return self.source(number), self._blob(number)

    def source(self, number: int) -> Source:
        """What reads shard `number`."""
        manifest, place = self.corpus.shard(number)
        return self._source(manifest, manifest.shards[place].kind)

    def _read(self, number: int, entries: Entries, here: np.ndarray) -> list[Content]:
        places = list(zip(entries.at[here].tolist(), entries.extent[here].tolist(), strict=True))
        with self._named(number):
            return _contents(*self.opened(number), places)

    @contextlib.contextmanager
    def _named(self, number: int) -> Iterator[None]:
        """What the store cannot read becomes an error that names the manifest of shard `number`."""
        manifest, _ = self.corpus.shard(number)
        try:
            yield
        except StoreError as error:
            raise UserError(
                f"cannot read a shard of the manifest {manifest.folder}: {error}; put it back or wait for the store, "
                "and start again, or run `millrace prepare` into a new folder"
            ) from None

    def _source(self, manifest: Manifest, kind: str) -> Source:
        with self._lock:
            if (manifest, kind) not in self._sources:
                self._sources[manifest, kind] = lookup(SOURCES, kind, "source")(manifest.columns)
            return self._sources[manifest, kind]

    def _blob(self, number: int) -> Blob:
        """The shard, opened at first use; closed when the last read of it ends, once it is no more among the recent."""
        return self._blobs.get(number, partial(self._open, number))

    def _open(self, number: int) -> Blob:
        """Open a shard; raises `UserError` where its size is not the manifest's."""
        manifest, place = self.corpus.shard(number)
        blob, size = open_blob(manifest.shard_url(place)), manifest.shards[place].size
        if blob.size != size:
            raise UserError(
                f"the shard {blob.url} is not the file that {manifest.folder} was prepared from: "
                f"size {blob.size} (expected {size}); restore it, or run `millrace prepare` into a new folder"
            )
        return blob

    def _forget(self, number: int) -> None:
        """Read a shard anew from now on, not from what is kept of it in memory or in the cache."""
        if blob := self._blobs.pop(number):
            blob.forget()
        with self._lock:
            self._sources.clear()


def _contents(source: Source, blob: Blob, places: Sequence[Place]) -> list[Content]:
    """What a source reads; where a damaged head of the shard lets it read nothing, all samples are bad."""
    try:
        return source.read(blob, places)
    except UserError as error:
        return [BadSample(str(error)) for _ in places]


def _differs(content: Content, check: int) -> bool:
    """Whether it is not what was indexed; what was indexed could be read."""
    return isinstance(content, BadSample) or checksum(content) != check
