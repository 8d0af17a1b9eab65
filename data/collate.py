"""From planned rows to arrays (in a worker, without torch), and from arrays to tensors (in the rank)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from millrace.data.batch import IGNORED, Media, MicroBatch, SampleBatch, StepBatch, to_spans
from millrace.data.documents import Documents
from millrace.data.frames import Frame
from millrace.data.parts import Document
from millrace.data.state import LoaderState

if TYPE_CHECKING:
    import torch

Arrays = dict[str, np.ndarray]


def pack_rows(rows: Sequence[np.ndarray], documents: Documents, eos_id: int, sequence_length: int) -> Arrays:
    """Arrays of packed rows; a bad document becomes padding of its planned length.

    Returns:
        `inputs`, `labels`, `positions`: int32 of shape (rows, sequence_length); `row_spans`: (sample, start, end) of
        all rows, int64 of shape (S, 3); `offsets`: where each row's spans begin in them, int64 of shape (rows + 1,);
        `media_at`: (row, start, positions) of every medium, int64 of shape (M, 3), and each as `image/N` or `audio/N`.
    """
    planned = np.concatenate(list(rows))
    found = documents.take(planned[:, 0], planned[:, 3])
    media: list[tuple[int, int, int]] = []
    arrays: Arrays = {}
    pad = np.full(sequence_length, eos_id, np.int32)
    untold = np.full(sequence_length, IGNORED, np.int32)
    counting = np.arange(sequence_length, dtype=np.int32)
    inputs, labels, positions = [], [], []  # pieces of the rows, end to end
    for number, row in enumerate(rows):
        at = 0
        for sample, start, end, _, _ in row.tolist():
            length, document = end - start, found[sample]
            target = untold[:length]
            if document is not None:
                target = document.tokens[start + 1 : end + 1]
                if document.media:
                    assert start == 0, "a sample with media is never cut"
                    target = target.copy()
                    for medium in document.media:
                        target[medium.start - 1 :][: medium.positions] = IGNORED  # nothing there to predict
                        arrays[f"{medium.role}/{len(media)}"] = medium.value
                        media.append((number, at + medium.start, medium.positions))
            inputs.append(pad[:length] if document is None else document.tokens[start:end])
            labels.append(target)
            positions.append(counting[:length])
            at += length
        for pieces, fill in ((inputs, pad), (labels, untold), (positions, counting)):
            pieces.append(fill[: sequence_length - at])
    for name, pieces in (("inputs", inputs), ("labels", labels), ("positions", positions)):
        arrays[name] = np.concatenate(pieces).reshape(len(rows), sequence_length)
    arrays["row_spans"] = planned[:, :3]
    arrays["offsets"] = np.cumsum([0, *(len(row) for row in rows)])
    arrays["media_at"] = np.array(media, np.int64).reshape(-1, 3)
    return arrays


def stack_samples(rows: Sequence[np.ndarray], documents: Documents) -> Arrays:
    """Arrays of rows that are one sample each: `samples`, `good` (both (rows,)) and each value as `ROLE/ROW`."""
    samples = np.array([row[0, 0] if len(row) else -1 for row in rows], np.int64)
    there = samples[samples >= 0]
    found: dict[int, Document | None] = documents.take(there, None) | {-1: None}
    arrays: Arrays = {}
    for number, sample in enumerate(samples.tolist()):
        document = found[sample]
        if document is not None:
            arrays |= {f"{medium.role}/{number}": medium.value for medium in document.media}
            if document.text:
                arrays[f"tokens/{number}"] = document.tokens[document.text :]
    good = np.array([found[sample] is not None for sample in samples.tolist()])
    return arrays | {"samples": samples, "good": good}


def to_micro_batch(arrays: Mapping[str, np.ndarray], first: int = 0, stop: int | None = None) -> MicroBatch:
    """Tensors of rows [first, stop) of what `pack_rows` made."""
    import torch

    offsets = arrays["offsets"].tolist()
    stop = len(offsets) - 1 if stop is None else stop
    rows = [arrays["row_spans"][a:b] for a, b in itertools.pairwise(offsets[first : stop + 1])]
    inputs, labels, positions = (
        _pinned(torch.from_numpy(arrays[name][first:stop]).long()) for name in ("inputs", "labels", "positions")
    )
    lengths = [(row[:, 2] - row[:, 1]).tolist() for row in rows]
    media = [
        Media(role, row - first, start, count, _pinned(torch.from_numpy(arrays[f"{role}/{number}"])))
        for number, (row, start, count) in enumerate(arrays["media_at"].tolist())
        for role in ("image", "audio")
        if first <= row < stop and f"{role}/{number}" in arrays
    ]
    return MicroBatch(inputs, labels, positions, lengths, [to_spans(row) for row in rows], media)


def to_sample_batch(arrays: Mapping[str, np.ndarray], first: int, stop: int, eos_id: int) -> SampleBatch:
    """Tensors of rows [first, stop) of what `stack_samples` made."""
    import torch

    values: dict[str, torch.Tensor | list[torch.Tensor]] = {}
    lengths: dict[str, torch.Tensor] = {}
    for role, fill in (("image", 0), ("audio", 0), ("tokens", eos_id)):
        rows = [arrays.get(f"{role}/{number}") for number in range(first, stop)]
        there = [row for row in rows if row is not None]
        if not there:
            continue
        if role == "image":
            values[role] = _images([there[0] * 0 if row is None else row for row in rows])
            continue
        counts = [0 if row is None else len(row) for row in rows]
        padded = np.full((len(rows), max(counts)), fill, there[0].dtype)
        for number, row in enumerate(rows):
            padded[number, : counts[number]] = () if row is None else row
        values[role] = _pinned(torch.from_numpy(padded).long() if role == "tokens" else torch.from_numpy(padded))
        lengths[role] = torch.tensor(counts)
    return SampleBatch(values, lengths, arrays["samples"][first:stop].tolist(), arrays["good"][first:stop].tolist())


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """In page-locked memory where there is a GPU, so that the copy to it runs beside the computation."""
    import torch

    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _images(rows: list[np.ndarray]) -> Any:
    import torch

    if len({row.shape for row in rows}) == 1:
        return _pinned(torch.from_numpy(np.stack(rows)))
    return [_pinned(torch.from_numpy(row)) for row in rows]


def to_step_batch(frame: Frame) -> StepBatch:
    """Tensors of a frame that `Builder.build` made."""
    arrays, micro, eos_id = frame.arrays, int(frame.meta["micro_batch"]), int(frame.meta["eos_id"])
    packed = "inputs" in arrays
    count = len(arrays["inputs" if packed else "samples"])
    return StepBatch(
        micro_batches=[
            to_micro_batch(arrays, at, at + micro) if packed else to_sample_batch(arrays, at, at + micro, eos_id)
            for at in range(0, count, micro)
        ],
        local_tokens=int((arrays["labels"] != IGNORED).sum() if packed else arrays["good"].sum()),
        spans=to_spans(arrays["spans"]),
        state=LoaderState.from_dict(frame.meta["state"]),
        quarantined=frame.meta["quarantined"],
    )
