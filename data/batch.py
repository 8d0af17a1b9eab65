"""What the trainer receives, and how planned rows become tensors.

B: rows of a micro-batch, T: sequence length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

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


def collate(rows: Sequence[np.ndarray], documents: Documents, tokenizer: Tokenizer, sequence_length: int) -> MicroBatch:
    """Build the tensors of planned rows; a bad document becomes padding of its planned length."""
    import torch

    shape = (len(rows), sequence_length)
    inputs = np.full(shape, tokenizer.eos_id, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    positions = np.zeros(shape, np.int64)
    planned = np.concatenate(list(rows))
    found = documents.take(planned[:, 0], planned[:, 3])
    for number, row in enumerate(rows):
        at = 0
        for sample, start, end, _, _ in row.tolist():
            stop = at + end - start
            document = found[sample]
            if document is not None:
                inputs[number, at:stop] = document[start:end]
                labels[number, at:stop] = document[start + 1 : end + 1]
            positions[number, at:stop] = np.arange(end - start)
            at = stop
        positions[number, at:] = np.arange(sequence_length - at)
    return MicroBatch(
        torch.from_numpy(inputs),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        [(row[:, 2] - row[:, 1]).tolist() for row in rows],
        [to_spans(row) for row in rows],
    )


def to_spans(planned: np.ndarray) -> list[Span]:
    """Spans of planned rows of shape (spans, 5)."""
    return [(sample, start, end) for sample, start, end in planned[:, :3].tolist()]
