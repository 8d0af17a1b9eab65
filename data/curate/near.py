"""Near duplicates: MinHash over 5-grams of words, as FineWeb's (Penedo et al. 2024, arXiv:2406.17557).

datatrove makes the signatures (14 bands of 8 hashes) and finds the pairs that agree in a band. Two steps are ours. A
pair is believed only where at least 81 of all 112 hashes agree, since a band alone also joins 1 in 19 pairs of Jaccard
similarity 0.5. And of a cluster its first document in input order stays; datatrove keeps whichever became the root.
Signatures are on disk: 1.9 kB a document.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
from loguru import logger

from millrace.data.curate.words import WORDS, near_words, ngram_hashes

logger.disable("datatrove")  # which tells of every step on stderr

NGRAM = 5
BANDS, BAND_HASHES = 14, 8
HASHES = BANDS * BAND_HASHES
AGREE = 81  # of the hashes: 0.72, where a band finds a pair as likely as not: (1 / 14) ** (1 / 8)
DISK_BYTES = BANDS * (BAND_HASHES * 8 + 4) + HASHES * 8  # per document

_CONFIG = MinhashConfig(n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=BAND_HASHES)
_PIECE = 4096  # 5-grams whose 112 hashes are in memory at once
_NONE = np.zeros(HASHES, np.uint64)  # stands for a document of fewer than 5 words, which is no duplicate of any
_OPEN = 128  # units whose signatures are mapped
_REPRESENTATIVES = 64  # that a document is compared with, of those that share a band


class Signatures(MinhashDedupSignature):
    """datatrove's first stage, in bounded memory; also writes each document's hashes to `rows`, 112 of uint64."""

    def __init__(self, folder: Path, rows: BinaryIO) -> None:
        super().__init__(str(folder), _CONFIG, language=WORDS)
        self._rows = rows

    def get_shingles(self, text: str) -> np.ndarray:
        """Hashes of the 5-grams, shape (n, 1). datatrove's own call hashes strings, which xxhash 4 refuses."""
        shingles = ngram_hashes(near_words(text), NGRAM).reshape(-1, 1)
        if not len(shingles):
            self._rows.write(_NONE.tobytes())
        return shingles

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Smallest hashes, band by band. datatrove's own call needs 1.8 kB for every word."""
        pieces = (shingles[at : at + _PIECE] for at in range(0, len(shingles), _PIECE))
        lowest = np.minimum.reduce([np.array(super(Signatures, self).get_signature(p), np.uint64) for p in pieces])
        self._rows.write(lowest.tobytes())
        return [band.tolist() for band in lowest]


def band_pairs(band: int, signatures: Path, rows: Path, pairs: Path) -> np.ndarray:
    """Near duplicates that share this band: rows of (unit, document, unit, document), the earlier one first, int64.

    A document is linked to the first of those before it that its signature agrees with.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # it opens the files of all units at once
    MinhashDedupBuckets(str(signatures), str(pairs), config=_CONFIG, lines_to_buffer=1000).run(None, band, BANDS)
    found = np.fromfile(pairs / f"{band:05d}_00.dups", "<u4").astype(np.int64).reshape(-1, 2, 2)
    return np.array(list(_linked(found, Rows(rows))), np.int64).reshape(-1, 4)


def _linked(pairs: np.ndarray, rows: Rows) -> Iterator[tuple[int, int, int, int]]:
    """datatrove writes documents that share a band as a chain of neighbours: a-b, b-c."""
    last: tuple[int, int] | None = None
    known: list[tuple[int, int]] = []
    for first, second in ((tuple(a), tuple(b)) for a, b in pairs.tolist()):
        if first != last:
            known = [first]
        signature = rows.signature(*second)
        agreeing = [other for other in known if agreement(rows.signature(*other), signature) >= AGREE]
        if agreeing:
            yield *agreeing[0], *second
        else:
            known = [*known[-_REPRESENTATIVES + 1 :], second]
        last = second


class Rows:
    """Whole signatures, read by the document; the files of some units stay mapped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[int, np.ndarray] = {}

    def signature(self, unit: int, document: int) -> np.ndarray:
        """The 112 hashes of a document."""
        if unit not in self._open:
            if len(self._open) >= _OPEN:
                self._open.clear()
            self._open[unit] = np.memmap(self._folder / f"{unit:05d}", np.uint64, "r").reshape(-1, HASHES)
        return self._open[unit][document]


def agreement(one: np.ndarray, other: np.ndarray) -> int:
    """Hashes that agree; divided by 112 an estimate of the Jaccard similarity of the sets of 5-grams."""
    return int(np.count_nonzero(one == other))


def clusters(links: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(duplicates, the first document of each one's cluster), ascending; `links` are pairs of documents, shape (n, 2).

    Union by the smaller number with path halving. Memory: about 200 bytes per document in `links`.
    """
    parent: dict[int, int] = {}

    def root(document: int) -> int:
        while (above := parent.setdefault(document, document)) != document:
            parent[document] = above = parent[above]
            document = above
        return document

    for one, other in links.tolist():
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    duplicates = [document for document in sorted(parent) if parent[document] != document]
    return np.array(duplicates, np.int64), np.array([root(document) for document in duplicates], np.int64)


def found_probability(similarity: float) -> float:
    """How likely a pair of this Jaccard similarity is found: some band agrees, and 81 hashes of 112 do."""
    powers = np.arange(BAND_HASHES + 1)
    choose = np.array([1, 8, 28, 56, 70, 56, 28, 8, 1])
    band = choose * similarity**powers * (1 - similarity) ** (BAND_HASHES - powers)
    every, without = np.ones(1), np.ones(1)  # distributions of the number that agree; without: no band does in full
    for _ in range(BANDS):
        every, without = np.convolve(every, band), np.convolve(without, band[:-1])
    return float(every[AGREE:].sum() - without[AGREE:].sum())
