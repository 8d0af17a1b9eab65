"""From the token costs of a window to rows of spans; pure, so every rank makes the same plan.

A document of cost n + 1 is cut into spans of at most `sequence_length` positions. The spans are packed
best-fit-decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", 2024), then the rows are
permuted: decreasing length would otherwise show a window's long documents first.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from millrace.data.order import permute


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


def pack(costs: np.ndarray, capacity: int, best_fit: bool = True, key: int = 0) -> Packs:
    """Pack documents of `costs` positions into rows of `capacity`.

    With `best_fit`, rows are permuted by `key` (0 keeps their order); without, documents are laid end to end.
    """
    if not best_fit:
        return _concatenate(np.asarray(costs, np.int64), capacity)
    spans = cut(np.asarray(costs, np.int64), capacity)
    rows = best_fit_decreasing(spans[:, 2] - spans[:, 1], capacity)
    if key:
        count = np.array([len(rows)])
        rows = [rows[i] for i in permute(np.arange(len(rows)), count, np.array([key], np.uint64))]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    flat = [span for row in rows for span in row]
    return Packs(spans[flat], offsets, capacity)


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
    O(n log n): rows wait in one heap for each free length, and a bitset finds the tightest free length.
    """
    rows: list[list[int]] = []
    waiting: dict[int, list[int]] = {}
    free_lengths = 0  # bit f is set when some row has exactly f positions free
    order = np.lexsort((np.arange(len(lengths)), -np.asarray(lengths)))
    for item, length in zip(order.tolist(), np.asarray(lengths)[order].tolist(), strict=True):
        fits = free_lengths >> length
        if fits:
            free = length + (fits & -fits).bit_length() - 1
            row = heapq.heappop(waiting[free])
            if not waiting[free]:
                free_lengths ^= 1 << free
            rows[row].append(item)
        else:
            free, row = capacity, len(rows)
            rows.append([item])
        left = free - length
        if left:
            heap = waiting.setdefault(left, [])
            heapq.heappush(heap, row)
            free_lengths |= 1 << left
    return rows


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
