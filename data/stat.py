"""What a corpus holds and what a run will make of it, from the manifest alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from millrace.data import MODALITIES
from millrace.data.builder import Opened
from millrace.data.corpus import Corpus
from millrace.data.index import CHUNK

_WINDOWS = 20  # planned to see how well they pack


@dataclass(frozen=True)
class Lengths:
    """Samples and positions by cost, in powers of two: `edges[i] <= cost < edges[i + 1]`."""

    edges: np.ndarray
    samples: np.ndarray
    positions: np.ndarray


def lengths(corpus: Corpus) -> Lengths:
    """Histogram of the costs of all samples of a counted corpus; memory of one index file."""
    samples, positions = np.zeros(64, np.int64), np.zeros(64, np.int64)
    for manifest in corpus.manifests:
        for start in range(0, manifest.samples, CHUNK):
            ordinals = np.arange(start, min(start + CHUNK, manifest.samples))
            costs = manifest.entries(ordinals).tokens
            power = np.frexp(np.maximum(costs, 1).astype(np.float64))[1] - 1
            samples += np.bincount(power, minlength=64)
            positions += np.bincount(power, costs, minlength=64).astype(np.int64)
    used = np.flatnonzero(samples)
    kept = slice(int(used[0]), int(used[-1]) + 1)
    return Lengths(2 ** np.arange(kept.start, kept.stop + 1), samples[kept], positions[kept])


@dataclass(frozen=True)
class Packing:
    """How the first windows pack: `efficiency` is the share of positions that hold a token."""

    windows: int
    rows: int
    efficiency: float
    cut: float  # share of the documents that are cut into several spans


def packing(opened: Opened) -> Packing:
    """Plan the first windows of a stream.

    Raises:
        UserError: as `Opened.plan`.
    """
    stream = opened.plan()
    rows = used = cut = documents = 0
    length = opened.state.stages[-1].sequence_length
    for number in range(_WINDOWS):
        window = stream.planner.window(opened.state.stages, number)
        spans = window.packs.spans
        rows += len(window.packs)
        documents += int(spans[:, 0].max()) + 1
        if opened.corpus.media:  # the places of those that are too long stay empty
            costs = opened.corpus.lookup(window.spans[:, 0], ("tokens",))[0]
            media = opened.corpus.having(window.spans[:, 0], MODALITIES)
            spans = spans[(costs <= length) | ~media]
        used += int((spans[:, 2] - spans[:, 1]).sum())
        cut += int((np.bincount(spans[:, 0]) > 1).sum())
    return Packing(_WINDOWS, rows, used / max(rows * length, 1), cut / max(documents, 1))
