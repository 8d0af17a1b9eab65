"""Contents of samples: compared with their checksums, tokenised on first use, dropped after the last.

Nothing here depends on how many ranks there are: a rank asks for the documents of its own rows only.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from millrace.core.errors import UserError
from millrace.core.registry import lookup
from millrace.data import SOURCES
from millrace.data.corpus import Corpus
from millrace.data.index import Entries
from millrace.data.manifest import Manifest
from millrace.data.sources.base import BadSample, Content, Source, checksum
from millrace.data.stores.base import Blob, StoreError, open_blob
from millrace.data.tokenizer import Tokenizer

_OPEN_BLOBS = 128  # shards kept open
_READ_TOGETHER = 64  # samples that a thread reads at a time
_ALTERED = BadSample("is not what was prepared: its checksum differs; the shard was altered or is damaged")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardReader:
    """Reads samples of a corpus; callable from several threads at once."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._sources: dict[tuple[Manifest, str], Source] = {}
        self._blobs: OrderedDict[int, Blob] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, samples: np.ndarray) -> dict[int, Content]:
        """Contents of `samples` (unique, ascending), read in the order in which they lie.

        What was read is compared with the manifest's checksum; a sample that differs twice is bad.

        Raises:
            UserError: a shard is missing or has another size.
        """
        entries = self.corpus.entries(samples)
        shard = self.corpus.shard_of(samples)
        contents: dict[int, Content] = {}
        for number in np.unique(shard).tolist():
            here = np.flatnonzero(shard == number)
            found = self._read(number, entries, here)
            wrong = [i for i, content in zip(here, found, strict=True) if _differs(content, int(entries.check[i]))]
            contents.update(zip(samples[here].tolist(), found, strict=True))
            if wrong:
                self._forget(number)
                again = self._read(number, entries, np.array(wrong))
                contents.update(
                    (int(samples[i]), _ALTERED if _differs(content, int(entries.check[i])) else content)
                    for i, content in zip(wrong, again, strict=True)
                )
        return contents

    def _read(self, number: int, entries: Entries, here: np.ndarray) -> list[Content]:
        places = list(zip(entries.at[here].tolist(), entries.extent[here].tolist(), strict=True))
        manifest, place = self.corpus.shard(number)
        try:
            return self._source(manifest, manifest.shards[place].kind).read(self._blob(number), places)
        except StoreError as error:
            raise UserError(
                f"cannot read a shard of the manifest {manifest.folder}: {error}; put it back, or run "
                "`millrace prepare` into a new folder"
            ) from None

    def _source(self, manifest: Manifest, kind: str) -> Source:
        with self._lock:
            if (manifest, kind) not in self._sources:
                self._sources[manifest, kind] = lookup(SOURCES, kind, "source")(manifest.columns)
            return self._sources[manifest, kind]

    def _blob(self, number: int) -> Blob:
        """The shard, opened at first use; raises `UserError` where its size is not the manifest's."""
        with self._lock:
            blob = self._blobs.get(number)
            if blob is not None:
                self._blobs.move_to_end(number)
                return blob
        manifest, place = self.corpus.shard(number)
        blob, size = open_blob(manifest.shard_url(place)), manifest.shards[place].size
        if blob.size != size:
            raise UserError(
                f"the shard {blob.url} is not the file that {manifest.folder} was prepared from: "
                f"size {blob.size} (expected {size}); restore it, or run `millrace prepare` into a new folder"
            )
        with self._lock:
            self._blobs[number] = blob
            if len(self._blobs) > _OPEN_BLOBS:
                self._blobs.popitem(last=False)  # closed when the last read of it ends
        return blob

    def _forget(self, number: int) -> None:
        """Read a shard anew from now on, not from what is kept of it in memory or in the cache."""
        with self._lock:
            self._blobs.pop(number, None)
            self._sources.clear()


def _differs(content: Content, check: int) -> bool:
    return isinstance(content, dict) and checksum(content) != check


@dataclass
class _Held:
    content: (
        Future[dict[int, Content]] | str | np.ndarray | BadSample
    )  # being read; then text or tokens; then with borders
    uses: int
    ready: bool = False


class Documents:
    """Documents with their borders, [BOS] d1 … dn [EOS], for the rows that a rank will build."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, max_bad: int | None = None, threads: int = 1) -> None:
        self.reader = ShardReader(corpus)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="millrace-read")
        self._corpus, self._tokenizer = corpus, tokenizer
        self._budget = max(10, corpus.samples // 1000) if max_bad is None else max_bad
        self._held: dict[int, _Held] = {}
        self._bad: dict[int, str] = {}
        self._news: list[dict[str, object]] = []

    def expect(self, samples: np.ndarray) -> None:
        """Announce that each of `samples` (with repetitions) will be taken once; begin to read the new ones."""
        unique, uses = np.unique(samples, return_counts=True)
        new = unique[[sample not in self._held for sample in unique.tolist()]]
        for part in np.split(new, range(_READ_TOGETHER, len(new), _READ_TOGETHER)):
            reading = self._pool.submit(self.reader.read, part)
            self._held |= {sample: _Held(reading, 0) for sample in part.tolist()}
        for sample, count in zip(unique.tolist(), uses.tolist(), strict=True):
            self._held[sample].uses += count

    def take(self, samples: np.ndarray, costs: np.ndarray | None) -> dict[int, np.ndarray | None]:
        """Documents (int32, shape (n + 2,)) of `samples`, announced before; None for a bad one.

        `costs` are the planned costs n + 1 (None: no plan yet, any length will do).

        Raises:
            UserError: more bad samples than the budget allows.
        """
        self._tokenise(np.unique(samples).tolist())
        taken: dict[int, np.ndarray | None] = {}
        for number, sample in enumerate(samples.tolist()):
            held = self._held[sample]
            document = BadSample(self._bad[sample]) if sample in self._bad else held.content
            if isinstance(document, np.ndarray) and costs is not None and len(document) - 1 != costs[number]:
                document = BadSample(f"has {len(document) - 2} tokens, the manifest says {costs[number] - 1}")
            if isinstance(document, BadSample):
                self._quarantine(sample, document.why)
            taken[sample] = document if isinstance(document, np.ndarray) else None
            held.uses -= 1
            if held.uses == 0:
                del self._held[sample]
        return taken

    def close(self) -> None:
        """End the threads; what is still being read is waited for."""
        self._pool.shutdown(cancel_futures=True)

    def news(self) -> list[dict[str, object]]:
        """Quarantine entries {sample, shard, why} since the last call."""
        news, self._news = self._news, []
        return news

    def exclude(self, bad: Mapping[int, str]) -> None:
        """Use no sample of `bad` (sample → why) from now on, readable or not, and make no entry of it again.

        Raises:
            UserError: more bad samples than the budget allows.
        """
        self._bad |= bad
        self._check_budget()

    def _tokenise(self, samples: list[int]) -> None:
        fresh = [self._held[s] for s in samples if not self._held[s].ready]
        for sample in samples:
            held = self._held[sample]
            if isinstance(held.content, Future):
                held.content = _text_of(held.content.result()[sample])
        texts = [held for held in fresh if isinstance(held.content, str)]
        for held, ids in zip(texts, self._tokenizer.encode([str(h.content) for h in texts]), strict=True):
            held.content = ids
        for held in fresh:
            if isinstance(held.content, np.ndarray):
                held.content = self._bordered(held.content)
            held.ready = True

    def _bordered(self, ids: np.ndarray) -> np.ndarray | BadSample:
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self._tokenizer.vocab_size):
            return BadSample(f"token {ids.max()} is outside the vocabulary of {self._tokenizer.vocab_size}")
        borders = np.array([self._tokenizer.bos_id, self._tokenizer.eos_id], np.int32)
        return np.concatenate([borders[:1], ids.astype(np.int32), borders[1:]])

    def _quarantine(self, sample: int, why: str) -> None:
        if sample in self._bad:
            return
        self._bad[sample] = why
        self._news.append({"sample": sample, "shard": self._corpus.shard_url(sample), "why": why})
        self._check_budget()

    def _check_budget(self) -> None:
        if len(self._bad) > self._budget:
            sample, why = list(self._bad.items())[-1]
            raise UserError(
                f"{len(self._bad)} samples could not be used, more than data.max_bad_samples = {self._budget}"
                f" allows; last: sample {sample} of {self._corpus.shard_url(sample)}: {why}. Prepare data again, "
                "or raise it"
            )


def _text_of(content: Content) -> str | np.ndarray | BadSample:
    return content if isinstance(content, BadSample) else content.get("tokens", content.get("text"))  # type: ignore[return-value]
