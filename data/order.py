"""The order of samples: a pure function of (seed, g), where g counts samples over all epochs.

Blocks (row groups, runs of lines) are permuted; `shuffle_blocks` consecutive permuted blocks form a group,
and the samples of a group are permuted again. Both permutations are Feistel networks with cycle walking
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), so any position is reached directly.
Memory: O(blocks).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROUNDS = 6
_MASK = (1 << 64) - 1
_BLOCKS, _SAMPLES, _ROW_SEEDS = 1, 2, 4  # 3 is the rows' of millrace.data.stream


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014), elementwise on uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def derive_key(*parts: int) -> int:
    """A 64-bit key from integers, such as (seed, epoch, purpose)."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix(key ^ np.uint64(part & _MASK))
    return int(key[0])


def row_seeds(rows: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """A number for each row of planned spans (see `stream`) from which all that is random about it is drawn; uint64.

    Of the run's seed, the window, and the row's first span; so it is another when a sample comes again.
    """
    first = np.array([row[0] if len(row) else np.zeros(6, np.int64) for row in rows], np.int64).astype(np.uint64)
    key = np.full(len(rows), derive_key(seed, _ROW_SEEDS), np.uint64)
    for column in (5, 0, 1):  # window, sample, start
        key = _mix(key ^ first[:, column])
    return key


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


def permutation(size: int, key: int) -> np.ndarray:
    """`permute` of all of a small [0, size), int64 of shape (size,): each value is encrypted once, then looked up."""
    sizes, keys = np.array([size]), np.array([key], np.uint64)
    half = _half_bits(sizes)
    image = _feistel(np.arange(1 << 2 * int(half[0]), dtype=np.uint64), half, keys).astype(np.int64)
    value = image[:size]
    while (outside := value >= size).any():
        value = np.where(outside, image[value], value)
    return value


def _feistel(value: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (_mix(_mix(right ^ key) + np.uint64(number)) & mask)
    return (left << half) | right


@dataclass(frozen=True)
class Blocks:
    """Blocks by their first sample and number of samples, int64 arrays of shape (blocks,)."""

    firsts: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, sizes: Sequence[int] | np.ndarray) -> Blocks:
        """Blocks of `sizes` samples, numbered from 0."""
        kept = np.asarray(sizes, np.int64)
        return cls(np.cumsum(kept) - kept, kept)

    def __len__(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True)
class Growth:
    """From `position` on (samples drawn before), `blocks` are there as well."""

    position: int
    blocks: Blocks


@dataclass(frozen=True)
class _Run:
    """Equal epochs one after the other: the first is number `epoch` and starts at `position`.

    An epoch passes through its segments (first block, end block) one after the other; it has several only where blocks
    came while it was under way.
    """

    position: int
    epoch: int
    segments: tuple[tuple[int, int], ...]
    length: int  # samples of an epoch


@dataclass(frozen=True)
class _Segment:
    order: np.ndarray  # permuted blocks
    starts: np.ndarray  # (blocks + 1,) position in the segment where each permuted block starts
    group_starts: np.ndarray  # (groups + 1,) position where each group starts
    key: int


class Order:
    """Shuffled, endless order of samples: every epoch is a permutation of all samples that are there.

    Blocks that come while an epoch is under way are passed through at its end, so that each of its samples is drawn
    exactly once; from the next epoch on they are mixed with the others.
    """

    def __init__(self, growth: Sequence[Growth], seed: int, shuffle_blocks: int) -> None:
        """`growth`: what is there from which position on; the first at position 0."""
        self._firsts = np.concatenate([g.blocks.firsts for g in growth])
        self._sizes = np.concatenate([g.blocks.sizes for g in growth])
        self._ends = np.concatenate([[0], np.cumsum(self._sizes)])
        self._seed, self._group = seed, shuffle_blocks
        self._kept: dict[tuple[int, int], _Segment] = {}
        self._runs: list[_Run] = []
        for number, grown in enumerate(growth):
            self._grow(grown.position, sum(len(g.blocks) for g in growth[: number + 1]))
        self._positions = [run.position for run in self._runs]

    @property
    def samples_per_epoch(self) -> int:
        """Samples of an epoch after all growth."""
        return self._runs[-1].length

    def _run(self, position: int, epoch: int, segments: tuple[tuple[int, int], ...]) -> _Run:
        return _Run(position, epoch, segments, sum(int(self._ends[b] - self._ends[a]) for a, b in segments))

    def _grow(self, position: int, blocks: int) -> None:
        if not self._runs:
            self._runs = [self._run(0, 0, ((0, blocks),))]
            return
        while self._runs[-1].position > position:  # an epoch that has grown before, and is still under way
            self._runs.pop()
        last = self._runs[-1]
        epochs, into = divmod(position - last.position, last.length)
        start, epoch = position - into, last.epoch + epochs
        if start == last.position:
            self._runs.pop()
        if into:
            grown = self._run(start, epoch, (*last.segments, (last.segments[-1][1], blocks)))
            self._runs.append(grown)
            start, epoch = start + grown.length, epoch + 1
        self._runs.append(self._run(start, epoch, ((0, blocks),)))

    def samples(self, start: int, stop: int) -> np.ndarray:
        """Samples at positions [start, stop), int64 of shape (stop - start,)."""
        parts, at = [np.empty(0, np.int64)], start
        while at < stop:
            run = self._runs[bisect.bisect_right(self._positions, at) - 1]
            epochs, first = divmod(at - run.position, run.length)
            count = min(stop - at, run.length - first)
            parts.append(self._within(run, run.epoch + epochs, np.arange(first, first + count)))
            at += count
        return np.concatenate(parts)

    def sample_at(self, g: int) -> int:
        """The sample at position `g`."""
        return int(self.samples(g, g + 1)[0])

    def _within(self, run: _Run, epoch: int, positions: np.ndarray) -> np.ndarray:
        out, begin = np.empty(len(positions), np.int64), 0
        for first, end in run.segments:
            size = int(self._ends[end] - self._ends[first])
            here = (positions >= begin) & (positions < begin + size)
            if here.any():
                out[here] = self._moved(self._segment(epoch, first, end), positions[here] - begin)
            begin += size
        return out

    def _segment(self, epoch: int, first: int, end: int) -> _Segment:
        if (epoch, first) not in self._kept:
            key = derive_key(self._seed, epoch, _BLOCKS, *((first,) if first else ()))
            order = first + permute(np.arange(end - first), np.array([end - first]), np.array([key], np.uint64))
            starts = np.concatenate([[0], np.cumsum(self._sizes[order])])
            group_starts = np.append(starts[: -1 : self._group], starts[-1])
            kept = {k: v for k, v in self._kept.items() if k[0] >= epoch - 1}  # a window may straddle two
            self._kept = kept | {(epoch, first): _Segment(order, starts, group_starts, key)}
        return self._kept[epoch, first]

    def _moved(self, plan: _Segment, positions: np.ndarray) -> np.ndarray:
        group = np.searchsorted(plan.group_starts, positions, side="right") - 1
        begin = plan.group_starts[group]
        keys = _mix(np.uint64(derive_key(plan.key, _SAMPLES)) ^ group.astype(np.uint64))
        moved = begin + permute(positions - begin, plan.group_starts[group + 1] - begin, keys)
        block = np.searchsorted(plan.starts, moved, side="right") - 1
        return self._firsts[plan.order[block]] + moved - plan.starts[block]
