"""Shuffle quality, and what was repeated or lost, from the ids of the samples in the order in which they came."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


def distance_entropy(ids: np.ndarray) -> float:
    """Entropy (nats) of the distances |id(i+1) - id(i)|, as mosaicml-streaming's simulator measures shuffling."""
    counts = np.unique(np.abs(np.diff(ids)), return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def relative_entropy(ids: np.ndarray, permutations: int = 5) -> float:
    """`distance_entropy` over its mean for true permutations of as many samples."""
    draw = np.random.default_rng(0)
    truth = [distance_entropy(draw.permutation(len(ids))) for _ in range(permutations)]
    return distance_entropy(ids) / float(np.mean(truth))


def shards_per_batch(batches: Sequence[np.ndarray], samples: int, shards: int) -> float:
    """Mean number of distinct shards in a batch, over what a true permutation has (its expectation).

    A shard is a run of samples/shards consecutive ids.
    """
    size = -(-samples // shards)
    found = [len(np.unique(ids // size)) for ids in batches]
    return float(np.mean(found) / np.mean([expected_shards(len(ids), samples, size) for ids in batches]))


def expected_shards(drawn: int, samples: int, size: int) -> float:
    """Expected distinct shards among `drawn` of `samples` without replacement, in shards of `size` (the last smaller).

    A shard of s samples is missed with probability C(samples - s, drawn) / C(samples, drawn).
    """
    sizes = np.diff(np.append(np.arange(0, samples, size), samples))
    steps = np.arange(drawn)[:, None]
    return float((1 - np.prod(np.clip((samples - sizes - steps) / (samples - steps), 0, 1), axis=0)).sum())


def label_chi2(batches: Sequence[np.ndarray], labels: np.ndarray) -> float:
    """Mean χ² of the classes in a batch against those of all samples, over its expectation for a true permutation.

    That is (classes - 1) · (n - B) / (n - 1), B drawn of n without replacement. 1 is a true permutation; large values
    are batches of few classes.
    """
    share = np.bincount(labels) / len(labels)
    ratios = []
    for ids in batches:
        expected = share * len(ids)
        counts = np.bincount(labels[ids], minlength=len(share))
        truth = (len(share) - 1) * (len(labels) - len(ids)) / (len(labels) - 1)
        ratios.append(((counts - expected) ** 2 / expected).sum() / truth)
    return float(np.mean(ratios))


@dataclass(frozen=True)
class Tally:
    """Against an epoch in which every sample comes once."""

    duplicates: int  # deliveries beyond the first
    losses: int  # samples that never came


def tally(parts: Iterable[np.ndarray], samples: int) -> Tally:
    """Count over the ids that were consumed, in any order."""
    counts = np.bincount(np.concatenate([np.zeros(0, np.int64), *parts]), minlength=samples)
    return Tally(duplicates=int((counts - 1).clip(0).sum()), losses=int((counts == 0).sum()))
