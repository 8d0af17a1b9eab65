"""Global steps of examples: the order, packing and dealing of `millrace.data` over examples held in memory.

B rows of a micro-batch, T positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from millrace.core.errors import UserError
from millrace.data.batch import IGNORED, MicroBatch, StepBatch
from millrace.data.loader import check_batch
from millrace.data.order import Blocks, Growth, Order, derive_key
from millrace.data.packing import Packs, pack
from millrace.data.state import LoaderState, Stage
from millrace.data.stream import Deal, RowStream, Unread, Window
from millrace.finetune.examples import Example

WINDOW = 16384  # examples that are packed together
_MULTIPLE = 8  # rows that are not packed are as long as their longest example, rounded up
_ROWS = 1  # purpose of the key that permutes a window's rows


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 (hex) of the encoded examples, in order."""
    sums = hashlib.sha256()
    for example in examples:
        sums.update(f"{len(example.input_ids)},{len(example.labels)};".encode())
        sums.update(example.input_ids.astype("<i4").tobytes() + example.labels.astype("<i8").tobytes())
    return sums.hexdigest()


def split(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """(training, held-out) by the hash of an example's tokens, so that equal ones are on one side."""
    chosen = [
        int.from_bytes(hashlib.sha256(e.input_ids.astype("<i4").tobytes()).digest()[:8], "big") < share * 2**64
        for e in examples
    ]
    pairs = list(zip(examples, chosen, strict=True))
    return [e for e, out in pairs if not out], [e for e, out in pairs if out]


@dataclass(frozen=True)
class Layout:
    """How examples become rows; `seed` shuffles, `once` ends the stream after one pass."""

    length: int  # T of a packed row
    pack: bool
    seed: int
    per_example: bool = False  # one label for an example, not one for each token
    once: bool = False


class ExamplePlanner:
    """Plans any window of examples from its number alone (the planner of `millrace.data.stream.RowStream`)."""

    def __init__(self, examples: Sequence[Example], layout: Layout) -> None:
        self._costs = np.array([len(e.input_ids) for e in examples], np.int64)
        self._bytes = np.array([e.bytes for e in examples], np.int64)
        self._layout = layout
        self.size = min(WINDOW, len(examples))
        self._order = Order([Growth(0, Blocks.of([len(examples)]))], layout.seed, 1)
        self._planned: tuple[int, Window] | None = None

    def window(self, _stages: tuple[Stage, ...], number: int) -> Window:
        """Plan window `number` (there is one stage); without rows behind the end of a single pass."""
        if self._planned is None or self._planned[0] != number:
            self._planned = number, self._plan(number)
        return self._planned[1]

    def _plan(self, number: int) -> Window:
        start, stop = number * self.size, (number + 1) * self.size
        if self._layout.once:
            start, stop = min(start, len(self._costs)), min(stop, len(self._costs))
        samples = self._order.samples(start, stop)
        costs = self._costs[samples]
        if self._layout.pack:
            packs = pack(costs, self._layout.length, key=derive_key(self._layout.seed, number, _ROWS))
        else:
            each = np.arange(len(costs))
            packs = Packs(np.stack([each, 0 * each, costs], 1), np.arange(len(costs) + 1), self._layout.length)
        return Window.of(number, samples, costs, self._bytes[samples], packs)

    def rows(self, epochs: int) -> int:
        """Rows of the windows that hold the first `epochs` epochs."""
        return sum(len(self.window((), n).packs) for n in range(-(-epochs * len(self._costs) // self.size)))


class ExampleLoader:
    """Endless iterator of `StepBatch`, from `state` or from the start.

    Raises:
        UserError: no examples, ranks that do not divide the batch, or a state of another stream.
    """

    def __init__(
        self, examples: Sequence[Example], layout: Layout, deal: Deal, *, pad: int, state: LoaderState | None = None
    ) -> None:
        check_batch(deal.batch_rows, deal.micro_batch, deal.world)
        assert layout.seed is not None
        self._examples, self._layout, self._pad = examples, layout, pad
        self.planner = ExamplePlanner(examples, layout)
        stage = _stage(self.planner, layout, deal, fingerprint(examples))
        self.state = state or LoaderState(layout.seed, (stage,))
        self.state.check(stage, layout.seed, may_change=())
        self._stream = RowStream(self.planner, Unread(), deal, lambda steps, tokens: stage)  # type: ignore[arg-type]

    def __iter__(self) -> ExampleLoader:
        return self

    def __next__(self) -> StepBatch:
        step = self._stream.step(self.state)
        mine = self._stream.my_rows(step)
        micro = [collate(rows, self._examples, self._layout, self._pad) for rows in mine]
        self.state = step.after
        return StepBatch(
            micro_batches=micro,
            local_tokens=sum(int((m.labels_BT != IGNORED).sum()) for m in micro),
            local_bytes=sum(int(row[:, 4].sum()) for rows in mine for row in rows),
            step_spans=np.concatenate(step.rows)[:, :3],
            state=self.state,
        )

    def steps(self, epochs: int) -> int:
        """Global steps in which every example is seen at least `epochs` times."""
        return -(-self.planner.rows(epochs) // self._stream.deal.batch_rows)


def _stage(planner: ExamplePlanner, layout: Layout, deal: Deal, name: str) -> Stage:
    return Stage(
        start_window=0,
        manifests=(name,),
        components=("examples",),
        counts=(1,),
        batch=deal.batch_rows,
        sequence_length=layout.length,
        window=planner.size,
        shuffle_blocks=1,
        pack=layout.pack,
    )


def heldout_batches(
    examples: Sequence[Example], layout: Layout, deal: Deal, *, pad: int, max_rows: int | None
) -> Iterator[tuple[MicroBatch, int]]:
    """One pass, in an order that is always the same: (micro-batch, bytes of its targets); as many on every rank.

    `deal.batch_rows` is one micro-batch for each rank.
    """
    planner = ExamplePlanner(examples, layout)
    stage = _stage(planner, layout, deal, "")
    stream = RowStream(planner, Unread(), deal, lambda steps, tokens: stage)  # type: ignore[arg-type]
    state, rows, ended = LoaderState(layout.seed, (stage,)), 0, False
    while not ended and (max_rows is None or rows < max_rows):
        step = stream.step(state)
        state, ended = step.after, step.ended
        rows += len(step.rows)
        if any(len(row) for row in step.rows):
            mine = stream.my_rows(step)[0]
            yield collate(mine, examples, layout, pad), int(sum(row[:, 4].sum() for row in mine))


def collate(rows: Sequence[np.ndarray], examples: Sequence[Example], layout: Layout, pad: int) -> MicroBatch:
    """Tensors of planned rows. Labels are (B, T), or (B, 1) where an example has one label; padding is on the right."""
    import torch

    longest = max([1, *(int((row[:, 2] - row[:, 1]).sum()) for row in rows)])
    width = layout.length if layout.pack else min(layout.length, -(-longest // _MULTIPLE) * _MULTIPLE)
    shape = (len(rows), width)
    inputs, positions = np.full(shape, pad, np.int64), np.zeros(shape, np.int64)
    labels = np.full((len(rows), 1) if layout.per_example else shape, IGNORED, np.int64)
    for number, row in enumerate(rows):
        at = 0
        for sample, start, end in row[:, :3].tolist():
            assert start == 0, "an example is never cut"
            example = examples[sample]
            inputs[number, at : at + end] = example.input_ids
            labels[number, at : at + len(example.labels)] = example.labels
            positions[number, at : at + end] = np.arange(end)
            at += end
        positions[number, at:] = np.arange(width - at)
    return MicroBatch(
        torch.from_numpy(inputs),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        [row[:, :3] for row in rows],
    )


def require_examples(examples: Sequence[Example], name: str) -> None:
    """Refuse an empty set.

    Raises:
        UserError: there are none.
    """
    if not examples:
        raise UserError(f"{name} gave no examples; give at least one")
