"""Contents of samples: shards verified on first use, documents tokenised on first use, dropped after last.

Nothing here depends on how many ranks there are: a rank asks for the documents of its own rows only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from millrace.core.errors import UserError
from millrace.core.registry import lookup
from millrace.data import SOURCES
from millrace.data.manifest import Manifest
from millrace.data.sources.base import BadSample, Content, Source
from millrace.data.tokenizer import Tokenizer

# (path, size, mtime, hash) of the shards that this process has hashed
_VERIFIED: set[tuple[str, int, int, str]] = set()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardReader:
    """Reads samples of a manifest by ordinal."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._sources: dict[str, Source] = {}

    def read(self, samples: np.ndarray) -> dict[int, Content]:
        """Contents of `samples` (unique ordinals, ascending), read in the order in which they lie.

        Raises:
            UserError: a shard is missing or is not the file that the manifest was made from.
        """
        entries = self.manifest.entries(samples)
        shard = self.manifest.shard_of(samples)
        contents: dict[int, Content] = {}
        for number in np.unique(shard).tolist():
            here = np.flatnonzero(shard == number)
            places = [(int(entries.at[i]), int(entries.extent[i])) for i in here]
            found = self._source(self.manifest.shards[number].kind).read(self._verified(number), places)
            contents.update(zip(samples[here].tolist(), found, strict=True))
        return contents

    def _source(self, kind: str) -> Source:
        if kind not in self._sources:
            self._sources[kind] = lookup(SOURCES, kind, "source")(self.manifest.columns)
        return self._sources[kind]

    def _verified(self, number: int) -> Path:
        path, shard = self.manifest.shard_path(number), self.manifest.shards[number]
        try:
            status = os.stat(path)
            key = (str(path), status.st_size, status.st_mtime_ns, shard.sha256)
            if key in _VERIFIED:
                return path
            intact = status.st_size == shard.size and file_sha256(path) == shard.sha256
        except OSError as error:
            raise UserError(
                f"cannot read the shard {path} of the manifest {self.manifest.folder}: {error.strerror}; "
                "put the file back, or run `millrace prepare` into a new folder"
            ) from None
        if not intact:
            raise UserError(
                f"the shard {path} is not the file that {self.manifest.folder} was prepared from: "
                f"size {status.st_size} (expected {shard.size}), or SHA-256 not {shard.sha256[:12]}…; "
                "restore it, or run `millrace prepare` into a new folder"
            )
        _VERIFIED.add(key)
        return path


@dataclass
class _Held:
    content: Content  # text, later the whole document with its borders
    uses: int
    ready: bool = False


class Documents:
    """Documents with their borders, [BOS] d1 … dn [EOS], for the rows that a rank will build."""

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, max_bad: int | None = None) -> None:
        self.reader = ShardReader(manifest)
        self._manifest, self._tokenizer = manifest, tokenizer
        self._budget = max(10, manifest.samples // 1000) if max_bad is None else max_bad
        self._held: dict[int, _Held] = {}
        self._bad: dict[int, str] = {}
        self._news: list[dict[str, object]] = []

    def expect(self, samples: np.ndarray) -> None:
        """Announce that each of `samples` (with repetitions) will be taken once; read the new ones."""
        unique, uses = np.unique(samples, return_counts=True)
        new = unique[[sample not in self._held for sample in unique.tolist()]]
        self._held |= {sample: _Held(content, 0) for sample, content in self.reader.read(new).items()}
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
        self._news.append({"sample": sample, "shard": self._shard(sample), "why": why})
        self._check_budget()

    def _check_budget(self) -> None:
        if len(self._bad) > self._budget:
            sample, why = list(self._bad.items())[-1]
            raise UserError(
                f"{len(self._bad)} samples could not be used, more than data.max_bad_samples = {self._budget}"
                f" allows; last: sample {sample} of {self._shard(sample)}: {why}. Prepare data again, or raise it"
            )

    def _shard(self, sample: int) -> str:
        return str(self._manifest.shard_path(int(self._manifest.shard_of(np.array([sample]))[0])))
