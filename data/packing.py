"""From the token costs of a window to rows of spans; pure, so every rank makes the same plan.

A document of cost n + 1 is cut into spans of at most `sequence_length` positions. The spans are packed
best-fit-decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", 2024), then the rows are
permuted: decreasing length would otherwise show a window's long documents first.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from millrace.data.order import permutation


@dataclass(frozen=True)
class Packs:
    """Rows of spans: row r holds `spans[offsets[r] : offsets[r + 1]]`, each (slot in window, start, end)."""

    spans: np.ndarray  # int64 (spans, 3), in row order
    offsets: np.ndarray  # int64 (rows + 1,)
    capacity: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def efficiency(self) -> float:
        """Share of the rows' positions that hold a token."""
        used = int((self.spans[:, 2] - self.spans[:, 1]).sum())
        return used / max(len(self) * self.capacity, 1)


def pack(costs: np.ndarray, capacity: int, best_fit: bool = True, key: int = 0, *, alone: bool = False) -> Packs:
    """Pack documents of `costs` positions into rows of `capacity`.

    With `best_fit`, rows are permuted by `key` (0 keeps their order); without, documents are laid end to end. With
    `alone` every span has a row to itself, permuted as well.
    """
    if not best_fit and not alone:
        return _concatenate(np.asarray(costs, np.int64), capacity)
    spans = cut(np.asarray(costs, np.int64), capacity)
    each = np.arange(len(spans) + 1)
    items, offsets = (each[:-1], each) if alone else _best_fit(spans[:, 2] - spans[:, 1], capacity)
    if key:
        rows = permutation(len(offsets) - 1, key)
        counts = np.diff(offsets)[rows]
        ends = np.cumsum(counts)
        items = items[np.arange(len(items)) + np.repeat(offsets[rows] - ends + counts, counts)]
        offsets = np.concatenate([[0], ends])
    return Packs(spans[items], offsets, capacity)


def cut(costs: np.ndarray, capacity: int) -> np.ndarray:
    """Cut documents, in order, into spans (slot, start, end) of at most `capacity`; int64 of shape (S, 3)."""
    pieces = -(-costs // capacity)
    slots = np.repeat(np.arange(len(costs)), pieces)
    number = np.arange(len(slots)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = number * capacity
    return np.stack([slots, starts, np.minimum(starts + capacity, costs[slots])], axis=1).astype(np.int64)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of item numbers.

    Longest item first (ties: lowest number), into the fullest row that takes it (ties: the row opened first).
    """
    items, offsets = _best_fit(np.asarray(lengths), capacity)
    return [items[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())]


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Items, row after row, and the (rows + 1,) offsets of the rows among them.

    Rows wait in a list sorted by (free length, number), each written as one integer; the next empty row is its last. So
    finding the fullest row that takes an item, and putting it back, are bisections.
    """
    shift = len(lengths).bit_length()
    longest_first = np.argsort(-lengths, kind="stable")
    waiting, rows, left = [capacity << shift], 1, []
    for length in (lengths[longest_first] << shift).tolist():
        found = bisect_left(waiting, length)
        row = waiting.pop(found) - length
        if found == len(waiting):
            waiting.append((capacity << shift) + rows)
            rows += 1
        insort(waiting, row)
        left.append(row)
    numbers = np.array(left, np.int64) & ((1 << shift) - 1)
    offsets = np.concatenate([[0], np.bincount(numbers, minlength=rows - 1).cumsum()])
    return longest_first[np.argsort(numbers, kind="stable")], offsets


def _concatenate(costs: np.ndarray, capacity: int) -> Packs:
    """Lay documents end to end and cut the stream every `capacity` positions."""
    begins = np.concatenate([[0], np.cumsum(costs)])
    total = int(begins[-1])
    borders = np.unique(np.concatenate([begins, np.arange(0, total + capacity, capacity)]).clip(max=total))
    starts, stops = borders[:-1], borders[1:]
    slots = np.searchsorted(begins, starts, side="right") - 1
    spans = np.stack([slots, starts - begins[slots], stops - begins[slots]], axis=1).astype(np.int64)
    row = starts // capacity
    offsets = np.searchsorted(row, np.arange(-(-total // capacity) + 1)).astype(np.int64)
    return Packs(spans, offsets, capacity)
