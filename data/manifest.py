"""The manifest: which shards a corpus consists of, what they hold, and a fingerprint of all of it.

A folder with `manifest.json` and `index/NNNNN.parquet` (see `millrace.data.index`). Shards stay where they
lie; their URLs are relative where they move together with the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from millrace.core.errors import UserError
from millrace.core.rundir import write_atomic
from millrace.data.index import Entries, Index, write_index

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
    groups: list[list[int]]


class Manifest:
    """A corpus: shards, per-sample index, totals."""

    def __init__(self, folder: Path, record: Mapping[str, Any]) -> None:
        self.folder = folder
        self.columns: dict[str, str] = record["columns"]
        self.tokenizer: str | None = record["tokenizer"]  # hash that the token costs belong to
        self.sources: list[dict[str, Any]] = record["sources"]
        self.shards = [Shard(**shard) for shard in record["shards"]]
        self.samples: int = record["totals"]["samples"]
        self.bytes: int = record["totals"]["bytes"]
        self.tokens: int = record["totals"]["tokens"]  # targets in an epoch; 0 when not counted
        self.fingerprint: str = record["fingerprint"]
        self._starts = np.concatenate([[0], np.cumsum([s.samples for s in self.shards])]).astype(np.int64)
        self._index = Index(folder / "index", [chunk["sha256"] for chunk in record["index"]])

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
        if record["fingerprint"] != fingerprint(record):
            raise UserError(f"{folder / 'manifest.json'} was altered by hand: its fingerprint does not fit")
        if record["totals"]["samples"] == 0:
            raise UserError(f"the corpus {folder} is empty: it has no samples; prepare it from other inputs")
        return cls(folder, record)

    def entries(self, samples: np.ndarray) -> Entries:
        """Index entries of `samples` (ordinals)."""
        return self._index.lookup(samples)

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


def fingerprint(record: Mapping[str, Any]) -> str:
    """SHA-256 over content and order, not over where files lie or how sources are called."""
    content = {
        "version": record["version"],
        "columns": record["columns"],
        "tokenizer": record["tokenizer"],
        "shards": [[s["kind"], s["sha256"], s["samples"], s["groups"]] for s in record["shards"]],
        "index": record["index"],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def build_manifest(
    folder: Path,
    shards: Sequence[Shard],
    sources: Sequence[Mapping[str, Any]],
    parts: Iterable[Entries],
    *,
    columns: Mapping[str, str],
    tokenizer: str | None,
) -> dict[str, Any]:
    """Write the index from `parts` (streamed, in shard order); return the record for `commit_manifest`."""
    folder.mkdir(parents=True, exist_ok=True)
    totals = {"samples": 0, "bytes": 0, "tokens": 0}

    def counted() -> Iterable[Entries]:
        for part in parts:
            totals["samples"] += len(part)
            totals["bytes"] += int(part.bytes.sum())
            totals["tokens"] += int(part.tokens.sum())
            yield part

    index = write_index(folder / "index", counted())
    assert totals["samples"] == sum(shard.samples for shard in shards)
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "columns": dict(columns),
        "tokenizer": tokenizer,
        "totals": totals,
        "sources": [dict(source) for source in sources],
        "shards": [asdict(shard) for shard in shards],
        "index": index,
    }
    record["fingerprint"] = fingerprint(record)
    return record


def commit_manifest(folder: Path, record: Mapping[str, Any]) -> None:
    """Make the manifest visible; everything that it refers to is there already."""
    write_atomic(folder / "manifest.json", json.dumps(record, indent=1))
