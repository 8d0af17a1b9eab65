"""A corpus: one manifest or several, with sample numbers that stay valid when shards or manifests are added.

Manifests may have different roles: images with text, sounds with text, text alone. A sample has those of its manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from millrace.core.errors import UserError
from millrace.data import CODES, MODALITIES
from millrace.data.index import CHUNK, COLUMNS, Entries
from millrace.data.manifest import Manifest
from millrace.data.order import Blocks

_BITS = 40  # a sample is (manifest << 40) + its ordinal there
TEXT = ("text", "tokens")  # the roles that stand for text


@dataclass(frozen=True)
class Source:
    """One named source of a manifest, and what it holds."""

    name: str
    manifest: int
    number: int  # in the manifest
    samples: int
    bytes: int
    tokens: int


class Corpus:
    """Manifests read as one."""

    def __init__(self, manifests: Sequence[Manifest]) -> None:
        self.manifests = list(manifests)
        _check_alike(self.manifests)
        self.samples = sum(m.samples for m in self.manifests)
        self.bytes = sum(m.bytes for m in self.manifests)
        self.tokens = sum(m.tokens for m in self.manifests)  # targets in an epoch; 0 when not counted
        self.counted = all(m.counted for m in self.manifests)
        self.costs = {role: rule for m in self.manifests for role, rule in m.costs.items()}  # of media
        self.media = [role for role in MODALITIES if any(role in m.columns for m in self.manifests)]
        self.texts = [m for m in self.manifests if any(role in m.columns for role in TEXT)]
        self.fingerprints = tuple(m.fingerprint for m in self.manifests)

    @classmethod
    def load(cls, paths: str | Sequence[str]) -> Corpus:
        """Read manifest folders.

        Raises:
            UserError: as `Manifest.load`, or manifests that do not go together.
        """
        return cls([Manifest.load(path) for path in ([paths] if isinstance(paths, str) else paths)])

    @property
    def folder(self) -> str:
        """Where it lies, for messages."""
        return ", ".join(str(m.folder) for m in self.manifests)

    def sources(self) -> list[Source]:
        """All sources of all manifests.

        Raises:
            UserError: a name that two of them share.
        """
        found = [
            Source(s["name"], number, place, s["documents"], s["bytes"], s["tokens"])
            for number, manifest in enumerate(self.manifests)
            for place, s in enumerate(manifest.sources)
        ]
        names = [source.name for source in found]
        for name in names:
            if names.count(name) > 1:
                raise UserError(
                    f"two sources of {self.folder} are named '{name}'; prepare one again as OTHERNAME=FILES"
                )
        return found

    def entries(self, samples: np.ndarray) -> Entries:
        """Index entries of `samples` (any order)."""
        return Entries(*self.lookup(samples, COLUMNS))

    def lookup(self, samples: np.ndarray, columns: Sequence[str]) -> np.ndarray:
        """Columns of the index for `samples` (any order), int64 of shape (columns, N)."""
        if len(self.manifests) == 1:
            return self.manifests[0].index.lookup(samples, columns)
        out = np.empty((len(columns), len(samples)), np.int64)
        for number, here in self._split(samples):
            out[:, here] = self.manifests[number].index.lookup(samples[here] & _ORDINAL, columns)
        return out

    def having(self, samples: np.ndarray, roles: Iterable[str]) -> np.ndarray:
        """Whether each of `samples` has one of `roles`, bool of shape (N,)."""
        with_it = [n for n, manifest in enumerate(self.manifests) if not manifest.columns.keys().isdisjoint(roles)]
        return np.isin(samples >> _BITS, with_it)

    def count_longer(self, length: int) -> int:
        """Samples with media of a counted corpus that cost more than `length` positions; memory of one index file."""
        found = 0
        for number, manifest in enumerate(self.manifests):
            if manifest.columns.keys().isdisjoint(MODALITIES):
                continue
            for start in range(0, manifest.samples, CHUNK):
                samples = (number << _BITS) + np.arange(start, min(start + CHUNK, manifest.samples))
                found += int((self.lookup(samples, ("tokens",)) > length).sum())
        return found

    def shard_of(self, samples: np.ndarray) -> np.ndarray:
        """(manifest << 40) + number of the shard that holds each sample."""
        out = np.empty(len(samples), np.int64)
        for number, here in self._split(samples):
            out[here] = (number << _BITS) + self.manifests[number].shard_of(samples[here] & _ORDINAL)
        return out

    def shard(self, number: int) -> tuple[Manifest, int]:
        """The manifest, and the number in it, of a shard that `shard_of` named."""
        return self.manifests[number >> _BITS], number & _ORDINAL

    def shard_url(self, sample: int) -> str:
        """Where the shard lies that holds `sample`."""
        manifest, number = self.shard(int(self.shard_of(np.array([sample]))[0]))
        return manifest.shard_url(number)

    def blocks(self, fingerprints: Sequence[str], source: Source | None) -> Blocks:
        """Blocks of one source (None: of all) in the manifests as they were when they had these `fingerprints`.

        They passed `check`.
        """
        parts = [
            _blocks(manifest, _shards_at(manifest, fingerprint) or 0, number, source)
            for number, (manifest, fingerprint) in enumerate(zip(self.manifests, fingerprints, strict=False))
        ]
        return Blocks(np.concatenate([p.firsts for p in parts]), np.concatenate([p.sizes for p in parts]))

    def extends(self, fingerprints: Sequence[str]) -> bool:
        """Whether it is the corpus that had these `fingerprints`, or that one with shards or manifests appended."""
        known = zip(self.manifests, fingerprints, strict=False)
        return 0 < len(fingerprints) <= len(self.manifests) and all(_shards_at(m, f) is not None for m, f in known)

    def check(self, fingerprints: Sequence[str]) -> None:
        """Refuse another corpus than the one that had these `fingerprints`, or than it with shards appended.

        Raises:
            UserError: a manifest that never had its fingerprint.
        """
        for manifest, fingerprint in zip(self.manifests, fingerprints, strict=False):
            if _shards_at(manifest, fingerprint) is None:
                raise UserError(
                    f"cannot resume the data stream: manifest {manifest.folder} was {fingerprint[:12]} and is now "
                    f"{manifest.fingerprint[:12]}, which is not the same with shards appended. Put the old one back to "
                    "continue exactly, or start a new run from the weights"
                )

    def _split(self, samples: np.ndarray) -> list[tuple[int, np.ndarray]]:
        numbers = samples >> _BITS
        return [(int(number), np.flatnonzero(numbers == number)) for number in np.unique(numbers)]


_ORDINAL = (1 << _BITS) - 1


def _check_alike(manifests: Sequence[Manifest]) -> None:
    """Refuse manifests whose samples cannot stand in one batch: what two of them have must be made alike."""
    known: dict[str, tuple[Manifest, Any]] = {}
    for manifest in manifests:
        for name, value in _facts(manifest).items():
            first, other = known.setdefault(name, (manifest, value))
            if value != other:
                raise UserError(
                    f"{first.folder} and {manifest.folder} do not go together: {name} {_short(other)} and "
                    f"{_short(value)}; prepare them with the same --tokenizer, --codec and options"
                )


def _facts(manifest: Manifest) -> dict[str, Any]:
    facts: dict[str, Any] = {f"costs of {role}": rule for role, rule in manifest.costs.items()}
    facts |= {f"the codec of {role}": manifest.codecs.get(role) for role in CODES.values() if role in manifest.columns}
    return facts | ({"tokenizer": manifest.tokenizer} if any(role in manifest.columns for role in TEXT) else {})


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _shards_at(manifest: Manifest, fingerprint: str) -> int | None:
    """Shards that the manifest had when it had this fingerprint; None where it never had."""
    return manifest.prefix(fingerprint)


def _blocks(manifest: Manifest, shards: int, number: int, source: Source | None) -> Blocks:
    if source is not None and source.manifest != number:
        return Blocks.of([])
    kept = manifest.shards[:shards]
    sizes, counts = np.array([p for s in kept for p in s.groups], np.int64).reshape(-1, 2).T
    sizes = np.repeat(sizes, counts)
    firsts = (number << _BITS) + np.cumsum(sizes) - sizes
    if source is None:
        return Blocks(firsts, sizes)
    of_shard = np.repeat([s.source for s in kept], [sum(c for _, c in s.groups) for s in kept])
    return Blocks(firsts[of_shard == source.number], sizes[of_shard == source.number])
