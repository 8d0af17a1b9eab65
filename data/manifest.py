"""The manifest: which shards a corpus consists of, what they hold, and a fingerprint of all of it.

A folder with `manifest.json` and `index/*.arrow` (see `millrace.data.index`). Shards stay where they lie; their URLs
are relative where they move together with the manifest, otherwise absolute paths or URLs of a store.

The cost of a sample (`tokens` in the index, in a shard and in the totals) is text tokens + 1 + positions of its media;
`columns` says which roles it has, `tokenizer` is the hash of what counted its text, and `costs` are the rules that
counted its media (see `millrace.data.costs`). All costs are 0 where they were not counted. `codecs`, where there are
any, are the hashes of what made its codes.

The fingerprint is the end of a chain of SHA-256: over the header (version, columns, tokenizer, costs, and codecs where
there are any), then shard by shard over (kind, SHA-256, samples, groups, entries). So an older state of a manifest
that grew since is known by its fingerprint (`Manifest.prefix`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from millrace.core.errors import UserError
from millrace.core.rundir import write_atomic
from millrace.data import index
from millrace.data.index import Chunk, Entries, Index, write_index

FORMAT = "millrace-manifest"
VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file. `groups` run-length encodes its blocks: [[samples in a block, number of such blocks], …]."""

    url: str
    kind: str
    source: int  # which of the manifest's sources it belongs to
    size: int  # bytes
    sha256: str
    samples: int
    bytes: int  # of text
    tokens: int  # sum of the samples' costs
    groups: list[list[int]]
    entries: str  # SHA-256 of its rows in the index (`Entries.digest`)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What holds for all samples of a manifest, and does not change when shards are appended."""

    columns: dict[str, str]  # role -> column or field
    tokenizer: str | None  # hash that the token costs belong to
    costs: dict[str, dict[str, Any]]  # role of a medium -> rule
    codecs: dict[str, str] = field(default_factory=dict)  # role of codes -> hash of the codec

    def record(self) -> dict[str, Any]:
        """As it is written: without codecs where there are none, as before there were any."""
        return {name: value for name, value in asdict(self).items() if name != "codecs" or value}


@dataclass(frozen=True)
class Kept:
    """The leading shards of a manifest, to append to: index files that stay, and the entries of a ragged last one."""

    shards: list[Shard] = field(default_factory=list)
    index: list[Chunk] = field(default_factory=list)
    rest: list[Entries] = field(default_factory=list)


class Manifest:
    """A corpus: shards, per-sample index, totals."""

    def __init__(self, folder: Path, record: Mapping[str, Any]) -> None:
        self.folder = folder
        self.columns: dict[str, str] = record["columns"]
        self.tokenizer: str | None = record["tokenizer"]  # hash that the token costs belong to
        self.costs: dict[str, dict[str, Any]] = record["costs"]
        self.codecs: dict[str, str] = record.get("codecs", {})
        self.sources: list[dict[str, Any]] = record["sources"]
        self.shards = [Shard(**shard) for shard in record["shards"]]
        self.samples: int = record["totals"]["samples"]
        self.bytes: int = record["totals"]["bytes"]
        self.tokens: int = record["totals"]["tokens"]  # positions in an epoch; 0 when not counted
        self.fingerprint: str = record["fingerprint"]
        self.index = Index(folder / "index", record["index"])
        self._chain = fingerprints(record)
        self._starts = np.concatenate([[0], np.cumsum([s.samples for s in self.shards])]).astype(np.int64)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read a manifest folder (or its manifest.json).

        Raises:
            UserError: missing, unreadable, of another format, altered, or without samples.
        """
        if not os.fspath(path):
            raise UserError("data.manifest is not set; name a folder that `millrace prepare` wrote")
        folder = manifest_folder(path)
        record = _read(folder)
        made = cls(folder, record)
        if made.fingerprint != made._chain[-1]:
            raise UserError(f"{folder / 'manifest.json'} was altered by hand: its fingerprint does not fit")
        if made.samples == 0:
            raise UserError(f"the corpus {folder} is empty: it has no samples; prepare it from other inputs")
        return made

    @property
    def counted(self) -> bool:
        """Whether the costs of samples are known (each is 1 or more)."""
        return self.tokens > 0

    def prefix(self, fingerprint: str) -> int | None:
        """How many leading shards a manifest with this fingerprint had, of which this one is the same or grew.

        None where it is no older state of this one: shards were changed, removed or re-ordered, or the header differs.
        """
        return self._chain.index(fingerprint) if fingerprint in self._chain else None

    def keep(self, shards: int) -> Kept:
        """The first `shards` shards, to append to."""
        samples = int(self._starts[shards])
        full, rest = divmod(samples, index.CHUNK)
        ragged = [self.index.read(full).part(0, rest)] if rest else []
        return Kept(self.shards[:shards], self.index.listed[:full], ragged)

    def entries(self, samples: np.ndarray) -> Entries:
        """Index entries of `samples` (ordinals)."""
        return Entries(*self.index.lookup(samples))

    def shard_of(self, samples: np.ndarray) -> np.ndarray:
        """Number of the shard that holds each sample."""
        return np.searchsorted(self._starts, samples, side="right") - 1

    def shard_url(self, number: int) -> str:
        """Where shard `number` lies: a path, or a URL of a store."""
        url = self.shards[number].url
        return url if "://" in url else os.path.normpath(self.folder / url)

    def block_sizes(self) -> np.ndarray:
        """Samples in every block of every shard, in order."""
        pairs = np.array([pair for shard in self.shards for pair in shard.groups], np.int64).reshape(-1, 2)
        return np.repeat(pairs[:, 0], pairs[:, 1])

    def check_tokenizer(self, sha256: str, name: str) -> None:
        """Refuse a tokenizer other than the one that the costs were counted with.

        Raises:
            UserError: the hashes differ.
        """
        if self.tokenizer is not None and self.tokenizer != sha256:
            raise UserError(
                f"the tokenizer {name} (hash {sha256[:12]}) is not the one that {self.folder} was prepared "
                f"with ({self.tokenizer[:12]}); leave data.tokenizer unset to use that one, or prepare again "
                "with yours"
            )


def manifest_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, whether it or its manifest.json is named."""
    return Path(path).parent if Path(path).name == "manifest.json" else Path(path)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / ".work").is_dir():
            raise UserError(f"{folder} is half prepared; run the same `millrace prepare` again to finish") from None
        raise UserError(
            f"no manifest in {folder} (no {path}); write one with `millrace prepare FILES --out {folder}`"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable manifest: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is not a millrace manifest; name a folder that `millrace prepare` wrote")
    if record.get("version") != VERSION:
        raise UserError(f"{path} has version {record.get('version')}, this release reads {VERSION}; prepare again")
    return record


def fingerprints(record: Mapping[str, Any]) -> list[str]:
    """The chain of fingerprints: of no shards, of the first one, …, of all.

    Over content and order, not over where files lie, which source they belong to, or how sources are called.
    """
    names = ("version", "columns", "tokenizer", "costs", "codecs")
    header = {name: record[name] for name in names if name in record}
    chain = [hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()]
    for s in record["shards"]:
        link = [chain[-1], s["kind"], s["sha256"], s["samples"], s["groups"], s["entries"]]
        chain.append(hashlib.sha256(json.dumps(link).encode()).hexdigest())
    return chain


def build_manifest(
    folder: Path,
    header: Header,
    names: Sequence[str],
    shards: Sequence[Shard],
    parts: Iterable[Entries],
    kept: Kept,
) -> dict[str, Any]:
    """Write the index of `shards` behind what is `kept`; return the record for `commit_manifest`.

    `parts` are the new shards' entries (streamed, in order), `names` those of the sources.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = write_index(folder / "index", itertools.chain(kept.rest, parts), kept.index)
    every = [*kept.shards, *shards]
    totals = {name: sum(getattr(shard, name) for shard in every) for name in ("samples", "bytes", "tokens")}
    assert totals["samples"] == sum(chunk["samples"] for chunk in listed)
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        **header.record(),
        "totals": totals,
        "sources": count_sources(names, every),
        "shards": [asdict(shard) for shard in every],
        "index": listed,
    }
    record["fingerprint"] = fingerprints(record)[-1]
    return record


def count_sources(names: Sequence[str], shards: Iterable[Shard]) -> list[dict[str, Any]]:
    """{"name", "documents", "bytes", "tokens"} of each source."""
    counts = [{"name": name, "documents": 0, "bytes": 0, "tokens": 0} for name in names]
    for shard in shards:
        of: dict[str, Any] = counts[shard.source]
        of["documents"] += shard.samples
        of["bytes"] += shard.bytes
        of["tokens"] += shard.tokens
    return counts


def commit_manifest(folder: Path, record: Mapping[str, Any]) -> None:
    """Make the manifest visible; everything that it refers to is there already."""
    write_atomic(folder / "manifest.json", json.dumps(record, indent=1))
