"""What the trainer receives.

B: rows of a micro-batch, T: sequence length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from millrace.data.state import LoaderState

if TYPE_CHECKING:
    import torch

IGNORED = -100

Span = tuple[int, int, int]
"""(sample, start, end) in positions 0 … n + 1 of the sample."""


@dataclass
class Media:
    """An image or a sound of a packed row, and the positions [start, start + positions) that stand for it."""

    role: str
    row: int
    start: int
    positions: int
    value: torch.Tensor  # image: uint8 (height, width, 3); audio: float32 (frames,)


@dataclass
class MicroBatch:
    """Rows of packed documents. Labels are aligned with the inputs: label t is the token after input t."""

    input_ids_BT: torch.Tensor  # int64
    labels_BT: torch.Tensor  # int64, -100 where there is no target
    position_ids_BT: torch.Tensor  # int64, 0 at the start of every span and of the padding
    row_spans: list[np.ndarray]  # (sample, start, end) of the spans of each row, int64 (S, 3)
    media: list[Media] = field(default_factory=list)
    seeds: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))  # of what is random about each row

    @cached_property
    def seq_lens(self) -> list[list[int]]:
        """Lengths of the spans of each row; padding excluded."""
        return [(spans[:, 2] - spans[:, 1]).tolist() for spans in self.row_spans]

    @property
    def spans(self) -> list[list[Span]]:
        """The spans of each row."""
        return [to_spans(spans) for spans in self.row_spans]

    @property
    def nbytes(self) -> int:
        """Size of the tensors."""
        rows = self.input_ids_BT.nbytes + self.labels_BT.nbytes + self.position_ids_BT.nbytes
        return rows + sum(medium.value.nbytes for medium in self.media)


@dataclass
class SampleBatch:
    """Whole samples, one in a row, for objectives that do not pack.

    `values` by role, or by the name of a view (`data.views`): `image` uint8 (B, height, width, 3), or a list of
    (height, width, 3) where sizes differ; `audio` float32 (B, longest), padded with zeros; `tokens` int64 (B, longest),
    padded with [EOS]; `image_codes`, `audio_codes` int32 (B, longest), padded with zeros. `lengths` are those of the
    unpadded ones, int64 (B,).

    Where manifests have different roles, all batches have all of them: a sample without one has zeros, and the length
    0. So does a bad sample, which is not `good` either. Where no sample of a batch has a role, its sizes are the
    view's, or those of the last one that was seen.
    """

    values: dict[str, torch.Tensor | list[torch.Tensor]]
    lengths: dict[str, torch.Tensor]
    samples: list[int]
    good: list[bool]
    seeds: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))  # of what is random about each
    present: dict[str, list[bool]] = field(default_factory=dict)  # by name, whether each sample has it

    def has(self, name: str) -> list[bool]:
        """Whether each sample has the value called `name`, which a bad one never has."""
        return self.present.get(name, self.good)

    def where(self, *names: str) -> SampleBatch:
        """The same batch, in which only samples that have all of `names` are good."""
        has = zip(self.good, *map(self.has, names), strict=True)
        return replace(self, good=[all(each) for each in has])

    @property
    def nbytes(self) -> int:
        """Size of the tensors."""
        rows = (value if isinstance(value, list) else [value] for value in self.values.values())
        return sum(tensor.nbytes for tensors in rows for tensor in tensors)


@dataclass
class StepBatch:
    """One optimiser step for this rank, and the state that a checkpoint taken after it needs."""

    micro_batches: list[Any]  # MicroBatch, or SampleBatch
    local_tokens: int  # targets on this rank, or good samples
    local_bytes: int  # of text that these targets stand for; a document that is cut shares them out by its spans
    step_spans: np.ndarray  # (sample, start, end) of the whole global step, in row order, int64 (S, 3)
    state: LoaderState
    quarantined: list[dict[str, Any]] = field(default_factory=list)  # {sample, shard, why}, this rank's

    @property
    def spans(self) -> list[Span]:
        """The spans of the whole global step, in row order."""
        return to_spans(self.step_spans)

    @property
    def nbytes(self) -> int:
        """Size of the tensors."""
        return sum(micro.nbytes for micro in self.micro_batches)


def spans_sha(spans: Sequence[Span] | np.ndarray) -> str:
    """SHA-256 (hex) over spans (also as an array) as little-endian int64 (sample, start, end)."""
    return hashlib.sha256(np.array(spans, "<i8").reshape(-1, 3).tobytes()).hexdigest()


def to_spans(planned: np.ndarray) -> list[Span]:
    """(sample, start, end) of arrays whose first three columns they are."""
    return list(map(tuple, planned[:, :3].tolist()))
