"""From planned rows to arrays (in a worker, without torch), and from arrays to tensors (in the rank)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from millrace.data.batch import IGNORED, Media, MicroBatch, SampleBatch, StepBatch, to_spans
from millrace.data.documents import Documents, Taken
from millrace.data.frames import Frame
from millrace.data.state import LoaderState

if TYPE_CHECKING:
    import torch

Arrays = dict[str, np.ndarray]


def pack_rows(rows: Sequence[np.ndarray], documents: Documents, eos_id: int, sequence_length: int) -> Arrays:
    """Arrays of packed rows; a bad document becomes padding of its planned length.

    Returns:
        `inputs`, `labels`, `positions`: int32 of shape (rows, sequence_length); `row_spans`: (sample, start, end) of
        all rows, int64 of shape (S, 3); `bytes`: of text that the targets of each stand for, int64 of shape (S,);
        `offsets`: where each row's spans begin in them, int64 of shape (rows + 1,);
        `media_at`: (row, start, positions) of every medium, int64 of shape (M, 3), and each as `image/N` or `audio/N`.
    """
    planned = np.concatenate(list(rows))
    ends = np.concatenate([[0], np.cumsum(planned[:, 2] - planned[:, 1])])  # of spans, all rows end to end
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    inputs, labels = np.empty(ends[-1], np.int32), np.empty(ends[-1], np.int32)
    arrays: Arrays = {"row_spans": planned[:, :3], "bytes": _covered(planned), "offsets": offsets}
    media_at: list[tuple[int, int, int]] = []
    for first, stop in _windows(planned):
        spans, at = planned[first:stop], ends[first : stop + 1]
        taken = documents.take(int(spans[0, 5]), spans[:, 0], spans[:, 3])
        here = slice(at[0], at[-1])
        _copy(taken, spans, at - at[0], inputs[here], labels[here])
        for number in np.flatnonzero(~taken.good).tolist():
            inputs[at[number] : at[number + 1]], labels[at[number] : at[number + 1]] = eos_id, IGNORED
            arrays["bytes"][first + number] = 0
        for number, media in taken.media.items():
            assert spans[number, 1] == 0, "a sample with media is never cut"
            row = int(np.searchsorted(offsets, first + number, side="right")) - 1
            for medium in media if taken.good[number] else ():
                begin = int(at[number]) + medium.start
                labels[begin - 1 :][: medium.positions] = IGNORED  # nothing there to predict
                arrays[f"{medium.role}/{len(media_at)}"] = medium.value
                media_at.append((row, begin - int(ends[offsets[row]]), medium.positions))
    arrays["media_at"] = np.array(media_at, np.int64).reshape(-1, 3)
    within = np.arange(ends[-1]) - ends[:-1].repeat(np.diff(ends))
    room = np.arange(sequence_length, dtype=np.int32) - np.diff(ends[offsets])[:, None]  # positions of the padding
    for name, values, fill in (("inputs", inputs, eos_id), ("labels", labels, IGNORED), ("positions", within, room)):
        arrays[name] = np.empty(room.shape, np.int32)
        arrays[name][:] = fill
        arrays[name][room < 0] = values
    return arrays


def _covered(planned: np.ndarray) -> np.ndarray:
    """Bytes of text of each span: a document's are shared out in proportion, and sum to the document exactly."""
    _, start, end, cost, size, _ = planned.T
    return np.asarray(size * end // cost - size * start // cost)


def _windows(planned: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs [first, stop) of spans of one window."""
    borders = np.flatnonzero(np.diff(planned[:, 5])) + 1
    return itertools.pairwise([0, *borders.tolist(), len(planned)] if len(planned) else [])


def _copy(taken: Taken, spans: np.ndarray, ends: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> None:
    """Tokens of spans, end to end up to `ends`, and those that follow each; anything where a document is not good."""
    begins = taken.starts + spans[:, 1]
    at = np.arange(ends[-1]) + (begins - ends[:-1]).repeat(np.diff(ends))
    np.take(taken.tokens, at, mode="clip", out=inputs)
    labels[:-1] = inputs[1:]
    labels[ends[1:] - 1] = np.take(taken.tokens, taken.starts + spans[:, 2], mode="clip")


def stack_samples(rows: Sequence[np.ndarray], documents: Documents) -> Arrays:
    """Arrays of rows that are one sample each: `samples`, `good` (both (rows,)) and each value as `ROLE/ROW`."""
    arrays: Arrays = {"samples": np.full(len(rows), -1), "good": np.zeros(len(rows), bool)}
    planned, there = np.concatenate(list(rows)), [number for number, row in enumerate(rows) if len(row)]
    for first, stop in _windows(planned):
        here, samples = there[first:stop], planned[first:stop, 0]
        taken = documents.take(int(planned[first, 5]), samples, None)
        arrays["samples"][here], arrays["good"][here] = samples, taken.good
        for number in np.flatnonzero(taken.good).tolist():
            media, begin, row = taken.media.get(number, ()), int(taken.starts[number]), here[number]
            arrays |= {f"{medium.role}/{row}": medium.value for medium in media}
            text = 1 + sum(medium.positions for medium in media)
            arrays[f"tokens/{row}"] = taken.tokens[begin + text : begin + int(taken.lengths[number])]
    return arrays


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
        local_bytes=int(arrays["bytes"].sum()) if packed else 0,
        spans=to_spans(arrays["spans"]),
        state=LoaderState.from_dict(frame.meta["state"]),
        quarantined=frame.meta["quarantined"],
    )
