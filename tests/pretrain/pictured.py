"""Packed rows of texts with and without images of several sizes; whole steps without any, or with some on one rank."""

from __future__ import annotations

import numpy as np
import torch

from millrace.data.batch import IGNORED, Media, MicroBatch

ROWS = 8
PATCH, T, EOS = 8, 48, 0
PICTURED = (range(ROWS), range(ROWS // 2), range(0), range(ROWS - 1, ROWS))  # rows with images, batch by batch


def pictured(number: int, first: int, stop: int) -> MicroBatch:
    """Rows [first, stop) of global batch `number`."""
    batch = rows_of([documents(number, row) for row in range(first, stop)])
    batch.media.reverse()  # their order says nothing
    return batch


def square(number: int, first: int, stop: int) -> MicroBatch:
    """The same with images of one size, of two by two patches."""
    return rows_of([documents(number, row, (2,)) for row in range(first, stop)])


def documents(number: int, row: int, sides: tuple[int, ...] = (1, 2, 3)) -> list[tuple[np.ndarray | None, np.ndarray]]:
    """(image or None, text) of each document of a row; images have `sides` patches each way."""
    random = np.random.default_rng([number, row])
    found: list[tuple[np.ndarray | None, np.ndarray]] = []
    for place in range(3):
        image = None
        if row in PICTURED[number % 4] and place != row % 3:
            # ragged ones are resized to whole patches
            height, width = PATCH * random.choice(sides, 2) - (random.integers(0, PATCH, 2) if len(sides) > 1 else 0)
            image = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
        found.append((image, random.integers(1, 50, random.integers(2, 5))))
    return found


def rows_of(rows: list[list[tuple[np.ndarray | None, np.ndarray]]]) -> MicroBatch:
    """What the loader makes of documents: [BOS] image text, and [EOS] for a target behind it."""
    shape = (len(rows), T)
    made = MicroBatch(torch.zeros(shape).long(), torch.full(shape, IGNORED), torch.zeros(shape).long(), [])
    for row, pieces in enumerate(rows):
        at, spans = 0, []
        for image, text in pieces:
            count = 0
            if image is not None:
                count = -(-image.shape[0] // PATCH) * -(-image.shape[1] // PATCH)
                made.media.append(Media("image", row, at + 1, count, torch.from_numpy(image)))
            ids = torch.tensor([EOS] * (1 + count) + text.tolist())
            made.input_ids_BT[row, at : at + len(ids)] = ids
            made.position_ids_BT[row, at : at + len(ids)] = torch.arange(len(ids))
            made.labels_BT[row, at + count : at + len(ids)] = torch.tensor([*text.tolist(), EOS])
            spans.append([0, 0, len(ids)])
            at += len(ids)
        made.row_spans.append(np.array(spans))
    return made
