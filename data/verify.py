"""`millrace data verify`: is everything that a manifest names still there, byte for byte?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from millrace.core.errors import UserError
from millrace.data.inputs import Progress, sha256_of
from millrace.data.manifest import Manifest, manifest_folder
from millrace.data.stores.base import StoreError, open_blob

_THREADS = 4  # shards hashed at once; SHA-256 lets other threads run


@dataclass(frozen=True)
class Problem:
    """A file that is not what was indexed."""

    url: str
    what: str


@dataclass
class Report:
    """What was looked at, and every problem that was found, in the order of the manifests."""

    shards: int = 0
    bytes: int = 0
    index_files: int = 0
    problems: list[Problem] = field(default_factory=list)


def verify(path: str | os.PathLike[str], progress: Progress) -> Report:
    """Hash all shards and index files of a manifest and of its held-out part.

    What a shard refers to outside itself (files of a folder) is covered by the samples' checksums only, which are
    compared whenever a sample is read.

    Raises:
        UserError: no manifest, or one that was altered.
    """
    folder = manifest_folder(path)
    manifests = [Manifest.load(folder)]
    if (folder / "heldout" / "manifest.json").is_file():
        manifests.append(Manifest.load(folder / "heldout"))
    report = Report()
    for manifest in manifests:
        report.problems += _index(manifest)
        report.index_files += len(manifest.index.listed)
    # A file may have samples in both parts: hash it once.
    wanted = {m.shard_url(i): (shard.size, shard.sha256) for m in manifests for i, shard in enumerate(m.shards)}
    total = sum(size for size, _ in wanted.values())
    with ThreadPoolExecutor(_THREADS) as pool:
        for url, what in zip(wanted, pool.map(lambda url: _shard(url, *wanted[url]), wanted), strict=True):
            report.shards += 1
            report.bytes += wanted[url][0]
            report.problems += [Problem(url, what)] if what else []
            progress("hashing shards", report.bytes, total)
    return report


def _shard(url: str, size: int, sha256: str) -> str:
    """What is wrong with a shard; empty where nothing is."""
    try:
        with open_blob(url) as blob:
            if blob.size != size:
                return f"{'short' if blob.size < size else 'altered'}: it has {blob.size} bytes, not {size}"
            blob.forget()
            return "" if sha256_of(blob) == sha256 else "altered: its SHA-256 differs"
    except StoreError as error:
        return f"missing: {error}"


def _index(manifest: Manifest) -> Iterator[Problem]:
    """Index files that are missing or altered; if none is, shards whose rows are not those of the fingerprint."""
    sha, left, shards, whole = hashlib.sha256(), 0, iter(manifest.shards), True
    for number in range(len(manifest.index.listed)):
        try:
            rows = manifest.index.read(number).rows()
        except UserError as error:
            yield Problem(str(manifest.index.path(number)), str(error))
            whole = False
        while whole and len(rows):
            if not left:
                shard = next(shards)
                sha, left = hashlib.sha256(), shard.samples
            sha.update(rows[:left].tobytes())
            left, rows = max(0, left - len(rows)), rows[left:]
            if not left and sha.hexdigest() != shard.entries:
                yield Problem(str(manifest.folder / "index"), f"the rows of {shard.url} are not that shard's")
