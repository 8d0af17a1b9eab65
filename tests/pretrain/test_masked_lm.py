"""Masked language modelling: what is hidden, and documents that do not see each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from millrace.data.batch import IGNORED, MicroBatch
from millrace.models.bridge import MASKED, build_model
from millrace.models.config import ModelConfig
from millrace.pretrain.objectives.masked_lm import Choice, MaskedLMModule, hide

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def choice(seed: int, share: float = 0.15) -> Choice:
    return Choice(np.random.default_rng(seed), share, mask=500, vocabulary=500)


def test_hidden_as_the_paper_says() -> None:
    ids = torch.arange(1000) % 480
    inputs, labels, real = ids.clone(), torch.full_like(ids, IGNORED), torch.ones(1000, dtype=torch.bool)
    real[::10] = False
    hide(inputs, labels, real, choice(0))
    chosen = labels != IGNORED
    assert chosen.sum() == 135 and not chosen[::10].any(), "15% of those that are real"
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(inputs[~chosen], ids[~chosen])
    masked = inputs[chosen] == 500
    assert masked.sum() == 108
    left = inputs[chosen][~masked] == ids[chosen][~masked]
    assert 13 <= left.sum() <= 15, "10% stay; of the 10% that are replaced by any token one may be the same"


def test_one_token_at_least_and_none_where_there_is_none() -> None:
    for length, expected in ((1, 1), (0, 0)):
        inputs, labels = torch.zeros(length, dtype=torch.long), torch.full((length,), IGNORED)
        hide(inputs, labels, torch.ones(length, dtype=torch.bool), choice(0))
        assert (labels != IGNORED).sum() == expected


def test_the_same_from_the_same_seed() -> None:
    def hidden(seed: int) -> torch.Tensor:
        inputs, labels = torch.arange(200), torch.full((200,), IGNORED)
        hide(inputs, labels, torch.ones(200, dtype=torch.bool), choice(seed))
        return inputs

    assert torch.equal(hidden(3), hidden(3)) and not torch.equal(hidden(3), hidden(4))


@pytest.mark.parametrize("kind", ["bert"])
def test_packed_equals_alone(kind: str) -> None:
    lengths, T = [17, 9, 26], 64
    model = build_model(ModelConfig(kind=kind, config=SMALL), 500, T, 0, None, MASKED).eval()
    module, generator = MaskedLMModule(model), torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 500, (n,), generator=generator) for n in lengths]

    def micro(rows: list[list[torch.Tensor]]) -> MicroBatch:
        shape = (len(rows), T)
        batch = MicroBatch(torch.zeros(shape).long(), torch.full(shape, IGNORED), torch.zeros(shape).long(), [])
        for number, row in enumerate(rows):
            ends = np.cumsum([0, *map(len, row)])
            batch.input_ids_BT[number, : ends[-1]] = torch.cat(row)
            batch.position_ids_BT[number, : ends[-1]] = torch.cat([torch.arange(len(d)) for d in row])
            batch.labels_BT[number, : ends[-1] : 3] = torch.cat(row)[::3]
            batch.row_spans.append(np.array([[0, 0, len(d)] for d in row]))
        return batch

    def loss(rows: list[list[torch.Tensor]]) -> tuple[float, MicroBatch]:
        batch = micro(rows)
        with torch.no_grad():
            return module(**module.inputs(batch, torch.device("cpu")))[0].item(), batch

    packed, batch = loss([documents])
    labels = batch.labels_BT[0]
    alone = 0.0
    for start, document in zip(np.cumsum([0, *lengths]), documents, strict=False):
        one = micro([[document]])
        one.labels_BT.fill_(IGNORED)
        one.labels_BT[0, : len(document)] = labels[start : start + len(document)]
        with torch.no_grad():
            alone += module(**module.inputs(one, torch.device("cpu")))[0].item()
    assert packed == pytest.approx(alone, rel=1e-5)
