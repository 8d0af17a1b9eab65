"""The stream of rows: windows of the order, packed, cut into global steps and dealt to ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from millrace.data.manifest import Manifest
from millrace.data.order import Order, derive_key
from millrace.data.packing import Packs, pack
from millrace.data.reader import Documents

_WINDOW_BYTES = 16 * 2**20  # a window's expected text; windows of long documents hold fewer samples
_ROWS = 3  # purpose of the key that permutes a window's rows

# A planned span is (sample, start, end, cost, bytes): int64 arrays of shape (spans, 5).
NO_SPANS = np.empty((0, 5), np.int64)


def window_samples(manifest: Manifest, wanted: int) -> int:
    """Samples in a window: `wanted`, at most an epoch, and fewer where documents are long."""
    mean = max(manifest.bytes / manifest.samples, 1)
    return max(1, min(wanted, manifest.samples, int(_WINDOW_BYTES / mean)))


@dataclass(frozen=True)
class Window:
    """A planned window: its documents' (sample, cost, bytes), int64 of shape (W, 3), and their packs."""

    documents: np.ndarray
    packs: Packs

    def rows(self, start: int, stop: int) -> list[np.ndarray]:
        """Planned spans of rows [start, stop)."""
        begin, offsets = self.packs.offsets[start], self.packs.offsets[start : stop + 1]
        spans = self.packs.spans[begin : offsets[-1]]
        documents = self.documents[spans[:, 0]]
        planned = np.concatenate([documents[:, :1], spans[:, 1:], documents[:, 1:]], axis=1)
        return np.split(planned, (offsets - begin)[1:-1])


@dataclass(frozen=True)
class Layout:
    """How windows are cut; `seed` permutes the rows of a window, `once` ends the stream after one pass."""

    window: int  # samples
    sequence_length: int
    pack: bool
    seed: int
    once: bool = False


class Planner:
    """Plans any window from its number alone; every rank makes the same plan."""

    def __init__(self, documents: Documents, order: Order, layout: Layout) -> None:
        self._manifest = documents.reader.manifest
        self._documents, self._order, self._layout = documents, order, layout
        self._planned: tuple[int, Window] | None = None

    def window(self, number: int) -> Window:
        """Plan window `number`; without rows when it lies behind the end of a single pass."""
        if self._planned is None or self._planned[0] != number:
            self._planned = number, self._plan(number)
        return self._planned[1]

    def _plan(self, number: int) -> Window:
        layout, counted = self._layout, self._manifest.tokenizer is not None
        start, stop = number * layout.window, (number + 1) * layout.window
        if layout.once:
            start, stop = min(start, self._manifest.samples), min(stop, self._manifest.samples)
        samples = self._order.samples(start, stop)
        entries = self._manifest.entries(samples)
        costs = entries.tokens if counted else self._measure(samples)
        key = derive_key(layout.seed, number, _ROWS)
        packs = pack(costs, layout.sequence_length, layout.pack and counted, key)
        return Window(np.stack([samples, costs, entries.bytes], axis=1), packs)

    def _measure(self, samples: np.ndarray) -> np.ndarray:
        """Costs of documents that the manifest did not count: tokenise the whole window, on every rank."""
        self._documents.expect(samples)
        found = self._documents.take(samples, None)
        lengths = {sample: 1 if ids is None else len(ids) - 1 for sample, ids in found.items()}
        return np.array([lengths[sample] for sample in samples.tolist()], np.int64)


@dataclass(frozen=True)
class Deal:
    """How the rows of a global step are dealt: row (accumulation * world + rank) * micro_batch + m."""

    batch_rows: int
    micro_batch: int
    rank: int
    world: int

    def mine(self, positions: np.ndarray) -> np.ndarray:
        """Which positions in a step belong to this rank."""
        return (positions // self.micro_batch) % self.world == self.rank


@dataclass(frozen=True)
class Step:
    """A planned step (a single pass fills its last up with rows without spans), and where the next begins."""

    rows: list[np.ndarray]
    window: int
    packs_done: int
    ended: bool


class RowStream:
    """Cuts windows into steps and announces to `documents` what this rank will need, a window at a time."""

    def __init__(self, planner: Planner, documents: Documents, deal: Deal) -> None:
        self._planner, self._documents, self.deal = planner, documents, deal
        self._announced = -1

    def step(self, window: int, packs_done: int) -> Step:
        """Plan the step that begins at row `packs_done` of `window`; steps must be asked for in sequence."""
        rows: list[np.ndarray] = []
        while len(rows) < self.deal.batch_rows:
            plan = self._planner.window(window)
            if not len(plan.packs):
                break
            self._announce(plan, window, packs_done, len(rows))
            stop = min(len(plan.packs), packs_done + self.deal.batch_rows - len(rows))
            rows += plan.rows(packs_done, stop)
            window, packs_done = (window + 1, 0) if stop == len(plan.packs) else (window, stop)
        ended = len(rows) < self.deal.batch_rows
        return Step(rows + [NO_SPANS] * (self.deal.batch_rows - len(rows)), window, packs_done, ended)

    def _announce(self, plan: Window, number: int, first: int, filled: int) -> None:
        if number <= self._announced:
            return
        self._announced = number
        positions = (filled + np.arange(len(plan.packs) - first)) % self.deal.batch_rows
        rows = plan.rows(first, len(plan.packs))
        spans = [rows[i] for i in np.flatnonzero(self.deal.mine(positions))]
        self._documents.expect(np.concatenate([NO_SPANS, *spans])[:, 0])

    def my_rows(self, step: Step) -> list[list[np.ndarray]]:
        """This rank's rows, a list for each micro-batch."""
        size = self.deal.micro_batch
        starts = range(self.deal.rank * size, self.deal.batch_rows, self.deal.world * size)
        return [step.rows[start : start + size] for start in starts]
