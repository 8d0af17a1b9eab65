"""The stream of rows: windows of the mixture, packed, cut into global steps and dealt to ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from millrace.data import MODALITIES
from millrace.data.corpus import Corpus
from millrace.data.documents import Documents
from millrace.data.mixture import Mixture
from millrace.data.order import derive_key
from millrace.data.packing import Packs, pack
from millrace.data.readahead import ReadAhead
from millrace.data.state import SAMPLES, LoaderState, Stage

_WINDOW_BYTES = 16 * 2**20  # a window's expected text; windows of long documents hold fewer samples
_FOUND = 2**14  # samples that are looked up together, as many windows as that is
_AHEAD = 16  # windows planned, but for the present one, at most
_AHEAD_STEPS = 2  # steps for which windows are read ahead, at least two windows
_ROWS = 3  # purpose of the key that permutes a window's rows

# A planned span is (sample, start, end, cost, bytes, window): int64 arrays of shape (spans, 6).
NO_SPANS = np.empty((0, 6), np.int64)


def window_samples(corpus: Corpus, wanted: int) -> int:
    """Samples in a window: `wanted`, at most an epoch, and fewer where documents are long."""
    mean = max(corpus.bytes / corpus.samples, 1)
    return max(1, min(wanted, corpus.samples, int(_WINDOW_BYTES / mean)))


class Expecting(Protocol):
    """Who is told what will be needed: `Documents`, or nobody that reads."""

    read_ahead: ReadAhead | None

    def expect(self, window: int, samples: np.ndarray) -> None:
        """Each of `samples` will be taken once, for this window."""

    def refuse(self, samples: np.ndarray, why: str) -> None:
        """None of `samples` can be used."""


class Unread:
    """For plans that nobody builds."""

    read_ahead: ReadAhead | None = None

    def expect(self, window: int, samples: np.ndarray) -> None:
        """Read nothing."""

    def refuse(self, samples: np.ndarray, why: str) -> None:
        """Refuse nothing."""


@dataclass(frozen=True)
class Window:
    """A planned window: its planned spans, row after row, and its packs."""

    spans: np.ndarray
    packs: Packs
    cost: int  # of all documents

    @classmethod
    def of(cls, number: int, samples: np.ndarray, costs: np.ndarray, sizes: np.ndarray, packs: Packs) -> Window:
        """Window `number` of samples and their costs and bytes."""
        slots, starts, ends = packs.spans.T
        spans = np.empty((len(slots), 6), np.int64)
        for column, values in enumerate((samples[slots], starts, ends, costs[slots], sizes[slots], number)):
            spans[:, column] = values
        return cls(spans, packs, int(costs.sum()))

    def rows(self, start: int, stop: int) -> list[np.ndarray]:
        """Planned spans of rows [start, stop)."""
        return [self.spans[a:b] for a, b in itertools.pairwise(self.packs.offsets[start : stop + 1].tolist())]

    def samples(self, rows: np.ndarray) -> np.ndarray:
        """Samples of the spans of some rows; `rows`: whether each is one of them."""
        return self.spans[rows.repeat(np.diff(self.packs.offsets)), 0]


class Planner:
    """Plans any window from its number and the stages alone; every rank makes the same plan.

    `once` ends the stream after one pass.
    """

    def __init__(self, documents: Expecting, mixture: Mixture, seed: int, once: bool = False) -> None:
        self._corpus, self._documents, self._mixture = mixture.corpus, documents, mixture
        self._seed, self._once = seed, once
        self._planned: dict[tuple[tuple[Stage, ...], int], Window] = {}
        self._found: tuple[tuple[Stage, ...], range, np.ndarray] | None = None

    def window(self, stages: tuple[Stage, ...], number: int) -> Window:
        """Plan window `number` of the last stage; without rows when it lies behind the end of a single pass."""
        if (stages, number) not in self._planned:
            if len(self._planned) > _AHEAD:
                del self._planned[next(iter(self._planned))]
            self._planned[stages, number] = self._plan(stages, number)
        return self._planned[stages, number]

    @property
    def ahead(self) -> bool:
        """Whether windows can be planned without reading them."""
        return self._corpus.counted

    def _plan(self, stages: tuple[Stage, ...], number: int) -> Window:
        stage, counted = stages[-1], self._corpus.counted
        samples, costs, sizes = self._find(stages, number)
        if stage.sequence_length == SAMPLES:
            costs = np.ones(len(samples), np.int64)
        else:
            costs = costs if counted else self._measure(number, samples)
            if self._corpus.media:  # a sample with media is never cut
                long = (costs > stage.sequence_length) & self._corpus.having(samples, MODALITIES)
                why = f"costs more positions than a row has ({stage.sequence_length})"
                self._documents.refuse(samples[long], why)
                costs = np.where(long, stage.sequence_length, costs)
        key = derive_key(self._seed, number, _ROWS)
        packs = pack(costs, stage.sequence_length, bool(stage.pack) and counted, key, alone=stage.pack == "alone")
        return Window.of(number, samples, costs, sizes, packs)

    def _find(self, stages: tuple[Stage, ...], number: int) -> np.ndarray:
        """(sample, cost, bytes) of a window's documents, int64 of shape (3, W).

        Those of the next windows are found with them, each time of twice as many: one search for many costs little more
        than one for few, but the first step is not to wait for it.
        """
        if self._found is None or self._found[0] != stages or number not in self._found[1]:
            window = stages[-1].window
            ahead = 2 * len(self._found[1]) if self._found and self._found[1].stop == number else 1
            windows = range(number, number + max(1, min(ahead, _FOUND // window)))
            places = (np.array([windows.start, windows.stop]) - stages[-1].start_window) * window
            if self._once:
                places = places.clip(max=self._corpus.samples)
            samples = self._mixture.samples(stages, *places.tolist())
            found = np.concatenate([samples[None], self._corpus.lookup(samples, ("tokens", "bytes"))])
            self._found = stages, windows, found
        _, windows, found = self._found
        begin = (number - windows.start) * stages[-1].window
        return found[:, begin : begin + stages[-1].window]

    def _measure(self, number: int, samples: np.ndarray) -> np.ndarray:
        """Costs of documents that the manifest did not count: tokenise the whole window, on every rank."""
        if self._documents.read_ahead:
            self._documents.read_ahead.expect(samples)
        assert isinstance(self._documents, Documents), "only a plan without documents asks for counted costs"
        self._documents.expect(~number, samples)  # another number than when they are to be built
        found = self._documents.take(~number, samples, None)
        return np.where(found.good, found.lengths - 1, 1)


@dataclass(frozen=True)
class Deal:
    """How the rows of a global step are dealt: row (accumulation * world + rank) * micro_batch + m."""

    batch_rows: int  # wanted now; the steps of an earlier stage may have another number
    micro_batch: int
    rank: int
    world: int

    def mine(self, positions: np.ndarray) -> np.ndarray:
        """Which positions in a step belong to this rank."""
        return (positions // self.micro_batch) % self.world == self.rank


@dataclass(frozen=True)
class Share:
    """Which steps a worker builds: from step `first` on, every `stride`-th beginning with number `offset`."""

    offset: int = 0
    stride: int = 1
    first: int = 0

    def mine(self, steps: Any) -> Any:
        """Whether the step that follows so many steps is this worker's; elementwise on arrays."""
        return (steps - self.first) % self.stride == self.offset


@dataclass(frozen=True)
class Step:
    """A planned step (rows without spans fill up the last of a single pass, or of a stage), and the state after it."""

    rows: list[np.ndarray]
    sequence_length: int
    after: LoaderState
    ended: bool


Wanted = Callable[[int, int], Stage]
"""The stage that the configuration asks for after (steps, tokens)."""


class RowStream:
    """Cuts windows into steps and announces to `documents` what this rank will need, a window at a time."""

    def __init__(
        self, planner: Planner, documents: Expecting, deal: Deal, wanted: Wanted, share: Share | None = None
    ) -> None:
        self.planner, self._documents, self.deal, self._wanted = planner, documents, deal, wanted
        self.share = share or Share()
        self._announced = self._fetched = -1  # windows
        self._follow: tuple[Window, LoaderState, int] | None = None

    def step(self, state: LoaderState) -> Step:
        """Plan the step after `state`; steps must be asked for in sequence."""
        if self._follow:
            self._ahead(*self._follow)
        rows: list[np.ndarray] = []
        now = self._at_border(state, state.steps) if state.packs_done == 0 else state
        first, ended, done = now.stages[-1], False, now.packs_done
        while len(rows) < first.batch:
            stage = now.stages[-1]
            if (stage.batch, stage.sequence_length) != (first.batch, first.sequence_length):
                break  # the step ends with its stage
            plan = self.planner.window(now.stages, now.window)
            if not len(plan.packs):
                ended = True
                break
            self._announce(plan, now, done, len(rows))
            begin, done = done, min(len(plan.packs), done + first.batch - len(rows))
            rows += plan.rows(begin, done)
            if done == len(plan.packs):
                done = 0
                now = replace(now, window=now.window + 1, packs_done=0, tokens=now.tokens + plan.cost)
                if len(rows) < first.batch:
                    now = self._at_border(now, state.steps)
        padded = rows + [NO_SPANS] * (first.batch - len(rows))
        return Step(padded, first.sequence_length, replace(now, packs_done=done, steps=state.steps + 1), ended)

    def stays(self, state: LoaderState) -> bool:
        """Whether the step after `state` takes rows of the window alone in which `state` stands."""
        stop = state.packs_done + state.stages[-1].batch
        return state.packs_done > 0 and stop <= len(self.planner.window(state.stages, state.window).packs)

    def _at_border(self, state: LoaderState, steps: int) -> LoaderState:
        """Begin a new stage at this window where the configuration asks for another than the last."""
        wanted, last = self._wanted(steps, state.tokens), state.stages[-1]
        if replace(wanted, start_window=last.start_window) == last:
            return state
        wanted = replace(wanted, start_window=state.window)
        begun = state.stages[:-1] if last.start_window == state.window else state.stages  # a stage without windows
        return replace(state, stages=(*begun, wanted))

    def _announce(self, plan: Window, now: LoaderState, done: int, filled: int) -> None:
        """Tell of rows [done, …) of `plan`, the window of `now`; `filled` rows of the step precede them."""
        if now.window <= self._announced:
            return
        self._announced, self._follow = now.window, (plan, replace(now, packs_done=done), filled)
        mine = self._mine(plan, done, now, filled)
        self._fetch(now.window, mine)
        self._documents.expect(now.window, mine)

    def _mine(self, plan: Window, first: int, now: LoaderState, position: int) -> np.ndarray:
        """This rank's samples in rows [first, …) of `plan`; the first is row `position` of the step after `now`."""
        steps, positions = np.divmod(position + np.arange(len(plan.packs) - first), now.stages[-1].batch)
        mine = np.zeros(len(plan.packs), bool)
        mine[first:] = self.deal.mine(positions) & self.share.mine(now.steps + steps)
        return plan.samples(mine)

    def _ahead(self, plan: Window, now: LoaderState, position: int) -> None:
        """Let the windows that follow be fetched, though a new stage may yet change them.

        Only when the first step of a window is built: nothing must come before what that needs.
        """
        self._follow, room = None, 0.0
        if not (reading := self._documents.read_ahead) or not self.planner.ahead:
            return
        position += len(plan.packs) - now.packs_done
        far, blocks = _AHEAD_STEPS * self.share.stride * now.stages[-1].batch, now.stages[-1].shuffle_blocks
        for number in range(now.window + 1, now.window + _AHEAD):
            plan = self.planner.window(now.stages, number)
            mine = self._mine(plan, 0, now, position)
            room += reading.needs(len(mine), blocks)
            if room > reading.room or (position >= far and number > now.window + 2) or not len(plan.packs):
                break
            self._fetch(number, mine)
            position += len(plan.packs)

    def _fetch(self, window: int, samples: np.ndarray) -> None:
        if self._documents.read_ahead and window > self._fetched:
            self._fetched = window
            self._documents.read_ahead.expect(samples)

    def my_rows(self, step: Step) -> list[list[np.ndarray]]:
        """This rank's rows, a list for each micro-batch."""
        size = self.deal.micro_batch
        starts = range(self.deal.rank * size, len(step.rows), self.deal.world * size)
        return [step.rows[start : start + size] for start in starts]
