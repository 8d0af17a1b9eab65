"""What the trainer receives, and how planned rows become tensors.

B: rows of a micro-batch, T: sequence length.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from millrace.data.frames import Frame
from millrace.data.reader import Documents
from millrace.data.state import LoaderState
from millrace.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

IGNORED = -100

Span = tuple[int, int, int]
"""(sample, start, end) in positions 0 … n + 1 of the sample."""


@dataclass
class MicroBatch:
    """Rows of packed documents. Labels are aligned with the inputs: label t is the token after input t."""

    input_ids_BT: torch.Tensor  # int64
    labels_BT: torch.Tensor  # int64, -100 where there is no target
    position_ids_BT: torch.Tensor  # int64, 0 at the start of every span and of the padding
    seq_lens: list[list[int]]  # lengths of the spans of each row; padding excluded
    spans: list[list[Span]]


@dataclass
class StepBatch:
    """One optimiser step for this rank, and the state that a checkpoint taken after it needs."""

    micro_batches: list[MicroBatch]
    local_tokens: int  # targets on this rank
    spans: list[Span]  # of the whole global step, in row order
    state: LoaderState
    quarantined: list[dict[str, Any]] = field(default_factory=list)  # {sample, shard, why}, this rank's


def spans_sha(spans: Sequence[Span]) -> str:
    """SHA-256 (hex) over the spans as little-endian int64 (sample, start, end)."""
    return hashlib.sha256(np.array(spans, "<i8").reshape(-1, 3).tobytes()).hexdigest()


def collate(
    rows: Sequence[np.ndarray], documents: Documents, tokenizer: Tokenizer, sequence_length: int
) -> dict[str, np.ndarray]:
    """Arrays of planned rows; a bad document becomes padding of its planned length.

    Returns:
        `inputs`, `labels`, `positions`: int32 of shape (rows, sequence_length); `row_spans`: (sample, start, end) of
        all rows, int64 of shape (S, 3); `offsets`: where each row's spans begin in them, int64 of shape (rows + 1,).
    """
    shape = (len(rows), sequence_length)
    inputs = np.full(shape, tokenizer.eos_id, np.int32)
    labels = np.full(shape, IGNORED, np.int32)
    positions = np.zeros(shape, np.int32)
    planned = np.concatenate(list(rows))
    found = documents.take(planned[:, 0], planned[:, 3])
    counting = np.arange(sequence_length, dtype=np.int32)
    for number, row in enumerate(rows):
        at = 0
        for sample, start, end, _, _ in row.tolist():
            stop = at + end - start
            document = found[sample]
            if document is not None:
                inputs[number, at:stop] = document[start:end]
                labels[number, at:stop] = document[start + 1 : end + 1]
            positions[number, at:stop] = counting[: end - start]
            at = stop
        positions[number, at:] = counting[: sequence_length - at]
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    return {"inputs": inputs, "labels": labels, "positions": positions, "row_spans": planned[:, :3], "offsets": offsets}


def to_micro_batch(arrays: Mapping[str, np.ndarray]) -> MicroBatch:
    """Tensors of what `collate` made."""
    import torch

    rows = [arrays["row_spans"][a:b] for a, b in itertools.pairwise(arrays["offsets"].tolist())]
    inputs, labels, positions = (torch.from_numpy(arrays[n]).long() for n in ("inputs", "labels", "positions"))
    lengths = [(row[:, 2] - row[:, 1]).tolist() for row in rows]
    return MicroBatch(inputs, labels, positions, lengths, [to_spans(row) for row in rows])


def to_step_batch(frame: Frame) -> StepBatch:
    """Tensors of a frame that `Builder.build` made."""
    arrays, micro = frame.arrays, int(frame.meta["micro_batch"])
    parts = [
        {
            **{name: arrays[name][at : at + micro] for name in ("inputs", "labels", "positions")},
            "offsets": arrays["offsets"][at : at + micro + 1],
            "row_spans": arrays["row_spans"],
        }
        for at in range(0, len(arrays["inputs"]), micro)
    ]
    return StepBatch(
        micro_batches=[to_micro_batch(part) for part in parts],
        local_tokens=int((arrays["labels"] != IGNORED).sum()),
        spans=to_spans(arrays["spans"]),
        state=LoaderState.from_dict(frame.meta["state"]),
        quarantined=frame.meta["quarantined"],
    )


def to_spans(planned: np.ndarray) -> list[Span]:
    """(sample, start, end) of arrays whose first three columns they are."""
    return [(sample, start, end) for sample, start, end in planned[:, :3].tolist()]
