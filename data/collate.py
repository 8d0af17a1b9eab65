"""From planned rows to arrays (in a worker, without torch), and from arrays to tensors (in the rank)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from millrace.data.batch import IGNORED, Media, MicroBatch, SampleBatch, StepBatch
from millrace.data.documents import Documents
from millrace.data.frames import Frame
from millrace.data.order import row_seeds
from millrace.data.parts import Medium
from millrace.data.state import LoaderState

if TYPE_CHECKING:
    import torch

Arrays = dict[str, np.ndarray]


def pack_rows(rows: Sequence[np.ndarray], documents: Documents, eos_id: int, sequence_length: int, seed: int) -> Arrays:
    """Arrays of packed rows; a bad document becomes padding of its planned length. `seed` is the stream's.

    Returns:
        `inputs`, `labels`, `positions`: int32 of shape (rows, sequence_length); `row_spans`: (sample, start, end) of
        all rows, int64 of shape (S, 3); `bytes`: of text that the targets of each stand for, int64 of shape (S,);
        `offsets`: where each row's spans begin in them, int64 of shape (rows + 1,);
        `seeds`: of what is random about each row, uint64 of shape (rows,);
        `media_at`: (row, start, positions) of every medium, int64 of shape (M, 3), and each as `image/N` or `audio/N`.
    """
    planned, padding = np.concatenate(rows), np.full(sequence_length, eos_id, np.int32)
    room, taken = _Room.of(planned, [len(row) for row in rows], sequence_length), _take(planned, documents, padding)
    arrays: Arrays = {"row_spans": planned[:, :3], "bytes": _covered(planned), "offsets": room.offsets}
    inputs = _lay(taken.pieces, room, padding)
    labels = np.empty_like(inputs)
    labels[:-1] = inputs[1:]
    labels[room.starts + room.lengths - 1] = taken.following
    for row, used in enumerate(room.used.tolist()):
        labels[row * sequence_length + used : (row + 1) * sequence_length] = IGNORED
    for span in taken.bad:
        labels[room.starts[span] :][: room.lengths[span]] = IGNORED
        arrays["bytes"][span] = 0
    media_at = []
    for number, (span, medium) in enumerate(taken.media):
        row, start = divmod(int(room.starts[span]) + medium.start, sequence_length)
        labels[row * sequence_length + start - 1 :][: medium.positions] = IGNORED  # nothing there to predict
        arrays[f"{medium.role}/{number}"] = medium.value
        media_at.append((row, start, medium.positions))
    arrays["seeds"] = row_seeds(rows, seed)
    arrays["media_at"] = np.array(media_at, np.int64).reshape(-1, 3)
    for name, flat in (("inputs", inputs), ("labels", labels), ("positions", room.positions())):
        arrays[name] = flat.reshape(-1, sequence_length)
    return arrays


def cut_rows(arrays: Arrays, first: int, stop: int) -> Arrays:
    """Rows [first, stop) of what `pack_rows` made; those that have media are not cut."""
    if (first, stop) == (0, len(arrays["inputs"])):
        return arrays
    offsets = arrays["offsets"][first : stop + 1]
    spans = slice(offsets[0], offsets[-1])
    cut = {name: arrays[name][first:stop] for name in ("inputs", "labels", "positions", "seeds")}
    cut |= {name: arrays[name][spans] for name in ("row_spans", "bytes")}
    return cut | {"offsets": offsets - offsets[0], "media_at": arrays["media_at"]}


@dataclass(frozen=True)
class _Room:
    """Where the spans of some rows lie when all rows, with their padding, are laid end to end."""

    offsets: np.ndarray  # of each row's spans among all, (rows + 1,)
    lengths: np.ndarray  # of the spans, (S,)
    starts: np.ndarray  # of the spans, (S,)
    used: np.ndarray  # positions of each row before its padding, (rows,)
    length: int  # of a row

    @classmethod
    def of(cls, planned: np.ndarray, counts: Sequence[int], length: int) -> _Room:
        """`counts`: spans of each row, (rows,)."""
        offsets, lengths = np.cumsum([0, *counts]), planned[:, 2] - planned[:, 1]
        ends = np.concatenate([[0], lengths.cumsum()])
        used = ends[offsets[1:]] - ends[offsets[:-1]]
        skipped = np.arange(len(used)) * length - ends[offsets[:-1]]
        return cls(offsets, lengths, ends[:-1] + skipped.repeat(counts), used, length)

    def positions(self) -> np.ndarray:
        """Positions that begin at 0 with every span and with the padding, int32 (rows * length,)."""
        size = len(self.used) * self.length
        padding = np.arange(len(self.used)) * self.length + self.used
        borders = np.concatenate([self.starts, padding, [size]]).astype(np.int32)
        borders.sort()
        return np.arange(size, dtype=np.int32) - borders[:-1].repeat(borders[1:] - borders[:-1])


@dataclass
class _Pieces:
    """Tokens of spans, (length,) each, and the token behind each; padding for those of `bad` documents."""

    pieces: list[np.ndarray]
    following: np.ndarray
    bad: list[int]
    media: list[tuple[int, Medium]]


def _take(planned: np.ndarray, documents: Documents, padding: np.ndarray) -> _Pieces:
    found = _Pieces([], np.empty(len(planned), np.int32), [], [])
    for first, stop in _windows(planned):
        spans = planned[first:stop]
        taken = documents.take(int(spans[0, 5]), spans[:, 0], spans[:, 3])
        begins, ends = taken.starts + spans[:, 1], taken.starts + spans[:, 2]
        found.pieces += [taken.tokens[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]
        found.following[first:stop] = taken.tokens.take(ends, mode="clip") if len(taken.tokens) else 0
        for number in () if taken.good.all() else np.flatnonzero(~taken.good).tolist():
            found.bad.append(first + number)
            found.pieces[first + number] = padding[: spans[number, 2] - spans[number, 1]]
        for number, media in taken.media.items():
            assert spans[number, 1] == 0, "a sample with media is never cut"
            found.media += [(first + number, medium) for medium in media if taken.good[number]]
    return found


def _lay(pieces: Sequence[np.ndarray], room: _Room, padding: np.ndarray) -> np.ndarray:
    """Tokens of all rows with their padding, int32 (rows * length,)."""
    laid: list[np.ndarray] = []
    for (first, stop), used in zip(itertools.pairwise(room.offsets.tolist()), room.used.tolist(), strict=True):
        laid += pieces[first:stop]
        laid.append(padding[used:])
    return np.concatenate(laid)


def _covered(planned: np.ndarray) -> np.ndarray:
    """Bytes of text of each span: a document's are shared out in proportion, and sum to the document exactly."""
    _, start, end, cost, size, _ = planned.T
    return np.asarray(size * end // cost - size * start // cost)


def _windows(planned: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs [first, stop) of spans of one window."""
    windows = planned[:, 5]
    borders = (windows[1:] != windows[:-1]).nonzero()[0] + 1
    return itertools.pairwise([0, *borders.tolist(), len(planned)] if len(planned) else [])


def stack_samples(rows: Sequence[np.ndarray], documents: Documents, seed: int) -> Arrays:
    """Arrays of rows that are one sample each: `samples`, `good`, `seeds` (all (rows,)), each value as `ROLE/ROW`.

    `ROLE/` is what stands for it where no row of a micro-batch has one, so that all micro-batches look alike.
    """
    arrays: Arrays = {"samples": np.full(len(rows), -1), "good": np.zeros(len(rows), bool)}
    arrays["seeds"] = row_seeds(rows, seed)
    planned, there = np.concatenate(list(rows)), [number for number, row in enumerate(rows) if len(row)]
    for first, stop in _windows(planned):
        here, samples = there[first:stop], planned[first:stop, 0]
        taken = documents.take(int(planned[first, 5]), samples, None)
        arrays["samples"][here], arrays["good"][here] = samples, taken.good
        texts = documents.has_text(samples)
        for number in np.flatnonzero(taken.good).tolist():
            media, begin, row = taken.media.get(number, ()), int(taken.starts[number]), here[number]
            arrays |= {f"{medium.role}/{row}": medium.value for medium in media}
            if texts[number]:
                text = 1 + sum(medium.positions for medium in media)
                arrays[f"tokens/{row}"] = taken.tokens[begin + text : begin + int(taken.lengths[number])]
    arrays |= {f"{name}/": np.zeros_like(value) for name, value in documents.seen.items()}
    return arrays | ({"tokens/": np.zeros(1, np.int32)} if documents.text else {})


def to_micro_batch(arrays: Mapping[str, np.ndarray], first: int = 0, stop: int | None = None) -> MicroBatch:
    """Tensors of rows [first, stop) of what `pack_rows` made."""
    import torch

    offsets = arrays["offsets"].tolist()
    stop = len(offsets) - 1 if stop is None else stop
    rows = [arrays["row_spans"][a:b] for a, b in itertools.pairwise(offsets[first : stop + 1])]
    inputs, labels, positions = (
        _pinned(torch.from_numpy(arrays[name][first:stop]).long()) for name in ("inputs", "labels", "positions")
    )
    media = []
    for name, value in arrays.items():
        role, _, number = name.partition("/")
        row, start, count = arrays["media_at"][int(number)].tolist() if number else (-1, 0, 0)
        if first <= row < stop:
            media.append(Media(role, row - first, start, count, _pinned(torch.from_numpy(value))))
    return MicroBatch(inputs, labels, positions, rows, media, arrays["seeds"][first:stop])


def to_sample_batch(arrays: Mapping[str, np.ndarray], first: int, stop: int, eos_id: int) -> SampleBatch:
    """Tensors of rows [first, stop) of what `stack_samples` made."""
    import torch

    values: dict[str, torch.Tensor | list[torch.Tensor]] = {}
    lengths: dict[str, torch.Tensor] = {}
    present: dict[str, list[bool]] = {}
    for role in [name.removesuffix("/") for name in arrays if name.endswith("/")]:
        rows = [arrays.get(f"{role}/{number}") for number in range(first, stop)]
        present[role] = [row is not None for row in rows]
        blank = next((row * 0 for row in rows if row is not None), arrays[f"{role}/"])
        if blank.ndim > 1:
            values[role] = _stack([blank if row is None else row for row in rows])
            continue
        counts = [0 if row is None else len(row) for row in rows]
        width = max(counts) if any(present[role]) else len(blank)
        padded = np.full((len(rows), width), eos_id if role == "tokens" else 0, blank.dtype)
        for number, row in enumerate(rows):
            padded[number, : counts[number]] = () if row is None else row
        values[role] = _pinned(torch.from_numpy(padded).long() if role == "tokens" else torch.from_numpy(padded))
        lengths[role] = torch.tensor(counts)
    samples, good = (arrays[name][first:stop].tolist() for name in ("samples", "good"))
    return SampleBatch(values, lengths, samples, good, arrays["seeds"][first:stop], present)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """In page-locked memory where there is a GPU, so that the copy to it runs beside the computation."""
    import torch

    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _stack(rows: list[np.ndarray]) -> Any:
    import torch

    if len({row.shape for row in rows}) == 1:
        return _pinned(torch.from_numpy(np.stack(rows)))
    return [_pinned(torch.from_numpy(row)) for row in rows]


def to_step_batch(frame: Frame, state: LoaderState) -> StepBatch:
    """Tensors of a frame that `Builder.build` made, and the state after it."""
    arrays, micro, eos_id = frame.arrays, int(frame.meta["micro_batch"]), int(frame.meta["eos_id"])
    packed = "inputs" in arrays
    count = len(arrays["inputs" if packed else "samples"])
    return StepBatch(
        micro_batches=[
            to_micro_batch(arrays, at, at + micro) if packed else to_sample_batch(arrays, at, at + micro, eos_id)
            for at in range(0, count, micro)
        ],
        local_tokens=int(np.count_nonzero(arrays["labels"] != IGNORED if packed else arrays["good"])),
        local_bytes=int(arrays["bytes"].sum()) if packed else 0,
        step_spans=arrays["spans"],
        state=state,
        quarantined=frame.meta["quarantined"],
    )
