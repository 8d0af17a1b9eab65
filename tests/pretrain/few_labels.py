"""Batches of pictures of which few have a label, and the objective that learns from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from millrace.data.batch import SampleBatch
from tests.pretrain import samples_worker
from tests.pretrain.samples_worker import BAD, ROWS, Words

CLASSES = ["a", "b", "c"]
EOS = 7  # behind every text
HELDOUT = 1000  # from this batch on all good rows have a label
VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
SECTION: dict[str, Any] = {
    "kind": "consistency", "classes": CLASSES, "threshold": 0.4, "weight": 2.0, "decay": 0.8,
    "encoder": {"modality": "image", "kind": "vit", "config": VIT | {"patch_size": 4}},
}  # fmt: skip


def scenario(**section: Any) -> dict[str, Any]:
    """Of few labels, and then of a held-out batch."""
    made = {"objective": SECTION | section, "model": {}, "batch": HELDOUT}
    return made | {"batches": "tests.pretrain.few_labels:samples"}


def labels_of(number: int) -> list[int]:
    """The class of each row, or -1; as many have one as chance will have it, the bad one has none."""
    random = np.random.default_rng([number, 7])
    named = random.random(ROWS) < (1.0 if number >= HELDOUT else 0.4)
    found = np.where(named, random.integers(0, len(CLASSES), ROWS), -1)
    found[BAD] = -1
    return [int(label) for label in found]


def samples(number: int, first: int, stop: int) -> SampleBatch:
    """Rows [first, stop) of global batch `number`, in two views, with the name of the class as their text."""
    made, part = samples_worker.samples(number, first, stop), slice(first, stop)
    labels = labels_of(number)[part]
    texts = Words().encode(["" if label < 0 else CLASSES[label] for label in labels])
    tokens = np.full((len(texts), 2), EOS, np.int64)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)] = ids
    image: Any = made.values["image"]
    made.values |= {"weak": image, "strong": 255 - image.flip(2), "tokens": torch.from_numpy(tokens)}
    made.lengths["tokens"] = torch.tensor([len(ids) + 1 for ids in texts]) * torch.tensor(made.good)
    return made
