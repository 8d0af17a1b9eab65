"""Rows of templates as packed documents: whole samples laid end to end, or in the places of a loader's packed rows.

B rows of documents, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from millrace.data import CODES
from millrace.data.batch import IGNORED, Media, MicroBatch
from millrace.models.templates import Parts, Row
from millrace.models.vocabulary import TEXT

_MULTIPLE = 64  # of positions, so that shapes repeat
_MODALITY = {role: modality for modality, role in CODES.items()}


@dataclass(frozen=True)
class Documents:
    """Packed documents; labels as in `MicroBatch`, and what each target counts for."""

    input_ids_BT: Tensor
    labels_BT: Tensor
    shares_BT: Tensor  # float32; 0 where there is no target
    kinds_BT: Tensor  # int64, places in `templates.kinds`
    position_ids_BT: Tensor
    seq_lens: list[list[int]]


class _Page:
    """Arrays of documents that are being written; `fill` is the token where nothing is."""

    def __init__(self, shape: tuple[int, int], fill: int) -> None:
        self.inputs, self.labels = np.full(shape, fill), np.full(shape, IGNORED)
        self.shares, self.kinds = np.zeros(shape, np.float32), np.zeros(shape, np.int64)

    def write(self, number: int, start: int, row: Row) -> None:
        """A row from position `start` of row `number` on."""
        place = (number, slice(start, start + len(row.shares)))
        self.inputs[place], self.shares[place], self.kinds[place] = row.tokens[:-1], row.shares, row.kinds
        self.labels[place] = np.where(row.shares > 0, row.tokens[1:], IGNORED)

    def documents(self, positions_BT: Tensor, seq_lens: list[list[int]]) -> Documents:
        """As tensors."""
        found = [torch.from_numpy(array) for array in (self.inputs, self.labels, self.shares, self.kinds)]
        return Documents(found[0], found[1], found[2], found[3], positions_BT, seq_lens)


def laid(rows: Sequence[Row], most: int, fill: int) -> Documents:
    """Rows laid end to end, up to `most` positions, in as many rows as it takes; `fill` is the token of the padding."""
    packed: list[list[Row]] = [[]]
    for row in rows:
        if packed[-1] and sum(len(other.shares) for other in packed[-1]) + len(row.shares) > most:
            packed.append([])
        packed[-1].append(row)
    seq_lens = [[len(row.shares) for row in rows] for rows in packed]
    length = -(-max(1, *(sum(lengths) for lengths in seq_lens)) // _MULTIPLE) * _MULTIPLE
    page, positions_BT = _Page((len(packed), length), fill), torch.zeros(len(packed), length, dtype=torch.long)
    for number, (lengths, documents) in enumerate(zip(seq_lens, packed, strict=True)):
        start = 0
        for row in documents:
            page.write(number, start, row)
            start += len(row.shares)
        pieces = [torch.arange(count) for count in [*lengths, length - start]]
        positions_BT[number] = torch.cat(pieces)
    return page.documents(positions_BT, seq_lens)


def relaid(
    micro: MicroBatch,
    make: Callable[[Parts, np.random.Generator], Row | None],
    text: Callable[[np.ndarray, np.ndarray], Row | None],
    fill: int,
) -> Documents:
    """Packed rows with what `make` makes of every sample with codes in its place.

    A row is no longer than its place; what is left of that is no target. What `text` makes of inputs and labels stands
    in the places of text, a whole document or a piece of one. What is random about a span is drawn from its row's
    seed and its number there.
    """
    page = _Page((micro.input_ids_BT.shape[0], micro.input_ids_BT.shape[1]), fill)
    for number, (seed, lengths) in enumerate(zip(micro.seeds.tolist(), micro.seq_lens, strict=True)):
        start = 0
        for span, length in enumerate(lengths):
            media = [one for one in micro.media if one.row == number and start <= one.start < start + length]
            inputs, labels = (
                of[number, start : start + length].numpy() for of in (micro.input_ids_BT, micro.labels_BT)
            )
            random = np.random.default_rng([seed, span])
            made = make(_parts(inputs, media), random) if media else text(inputs, labels)
            if made is not None:
                assert len(made.shares) <= length, "a row has no more positions than its sample costs"
                page.write(number, start, made)
            start += length
    return page.documents(micro.position_ids_BT, micro.seq_lens)


def _parts(inputs: np.ndarray, media: Sequence[Media]) -> dict[str, np.ndarray]:
    """Of a sample: BOS, its media, its text."""
    words = inputs[1 + sum(one.positions for one in media) :]
    return {TEXT: words, **{_MODALITY[one.role]: one.value.numpy() for one in media}}
