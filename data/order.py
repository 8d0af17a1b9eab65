"""The order of samples: a pure function of (seed, g), where g counts samples over all epochs.

Blocks (row groups, runs of lines) are permuted; `shuffle_blocks` consecutive permuted blocks form a group,
and the samples of a group are permuted again. Both permutations are Feistel networks with cycle walking
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), so any position is reached directly.
Memory: O(blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDS = 6
_MASK = (1 << 64) - 1
_BLOCKS, _SAMPLES = 1, 2


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014), elementwise on uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_key(*parts: int) -> int:
    """A 64-bit key from integers, such as (seed, epoch, purpose)."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix(key ^ np.uint64(part & _MASK))
    return int(key[0])


def _half_bits(sizes: np.ndarray) -> np.ndarray:
    """Bits of one Feistel half, so that two halves cover [0, size)."""
    bits = np.frexp(np.maximum(sizes.astype(np.float64) - 1, 1))[1]
    return ((bits + 1) // 2).astype(np.uint64)


def permute(index: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Image of `index[i]` under the permutation of [0, sizes[i]) that `keys[i]` selects; all (N,)."""
    value = index.astype(np.uint64)
    size = np.broadcast_to(sizes, value.shape).astype(np.uint64)
    key = np.broadcast_to(keys, value.shape).astype(np.uint64)
    half = _half_bits(size)
    todo = np.arange(len(value))
    while len(todo):
        value[todo] = _feistel(value[todo], half[todo], key[todo])
        todo = todo[value[todo] >= size[todo]]
    return value.astype(np.int64)


def _feistel(value: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (_mix(_mix(right ^ key) + np.uint64(number)) & mask)
    return (left << half) | right


@dataclass(frozen=True)
class _Epoch:
    order: np.ndarray  # permuted blocks
    starts: np.ndarray  # (blocks + 1,) position in the epoch where each permuted block starts
    group_starts: np.ndarray  # (groups + 1,) position where each group starts
    key: int


class Order:
    """Shuffled order over blocks of `sizes` samples; sample ordinals follow the blocks' own order."""

    def __init__(self, sizes: Sequence[int] | np.ndarray, seed: int, shuffle_blocks: int) -> None:
        kept = np.asarray(sizes, np.int64)
        self._firsts = np.concatenate([[0], np.cumsum(kept)])[:-1]
        self._sizes, self._seed, self._group = kept, seed, shuffle_blocks
        self._epochs: dict[int, _Epoch] = {}
        self.samples_per_epoch = int(kept.sum())

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            count = len(self._sizes)
            key = derive_key(self._seed, epoch, _BLOCKS)
            order = permute(np.arange(count), np.array([count]), np.array([key], np.uint64))
            starts = np.concatenate([[0], np.cumsum(self._sizes[order])])
            group_starts = np.append(starts[: -1 : self._group], starts[-1])
            kept = {k: v for k, v in self._epochs.items() if k == epoch - 1}  # a window may straddle two
            self._epochs = kept | {epoch: _Epoch(order, starts, group_starts, key)}
        return self._epochs[epoch]

    def samples(self, start: int, stop: int) -> np.ndarray:
        """Sample ordinals at global positions [start, stop), int64 of shape (stop - start,)."""
        size = self.samples_per_epoch
        parts, at = [np.empty(0, np.int64)], start
        while at < stop:
            epoch, first = divmod(at, size)
            count = min(stop - at, size - first)
            parts.append(self._within(epoch, np.arange(first, first + count)))
            at += count
        return np.concatenate(parts)

    def sample_at(self, g: int) -> int:
        """The sample at global position `g`."""
        return int(self.samples(g, g + 1)[0])

    def _within(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        plan = self._epoch(epoch)
        group = np.searchsorted(plan.group_starts, positions, side="right") - 1
        begin = plan.group_starts[group]
        keys = _mix(np.uint64(derive_key(plan.key, _SAMPLES)) ^ group.astype(np.uint64))
        moved = begin + permute(positions - begin, plan.group_starts[group + 1] - begin, keys)
        block = np.searchsorted(plan.starts, moved, side="right") - 1
        return self._firsts[plan.order[block]] + moved - plan.starts[block]
