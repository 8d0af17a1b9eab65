"""Recall at k against counting by hand, and towers out of a checkpoint."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from millrace.core.errors import UserError
from millrace.eval.evaluate import Request, evaluate, show_result
from millrace.eval.retrieval import open_towers, recall
from millrace.models.config import TowerConfig
from millrace.models.towers import Tower, build_encoder

TOWER = {"modality": "text", "kind": "bert", "config": {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
}}  # fmt: skip


def vectors(seed: int, count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    a = torch.randn(count, 4, generator=random)
    return a, a + torch.randn(count, 4, generator=random)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("among", [1, 3, 6, 7])
def test_recall_is_the_mean_over_all_choices(k: int, among: int) -> None:
    queries, found = vectors(0)
    similar = (queries @ found.T).numpy()
    hits = []
    for own in range(7):
        others = [other for other in range(7) if other != own]
        for chosen in combinations(others, among - 1):
            order = sorted([own, *chosen], key=lambda n: -similar[own, n])
            hits.append(own in order[:k])
    assert recall(queries, found, k, among) == pytest.approx(np.mean(hits))


def test_recall_of_all() -> None:
    queries, found = vectors(1)
    ranks = (queries @ found.T).argsort(1, descending=True)
    expected = np.mean([n in row[:2] for n, row in enumerate(ranks.tolist())])
    assert recall(queries, found, 2) == recall(queries, found, 2, 7) == pytest.approx(expected)


def test_what_is_as_similar_comes_before() -> None:
    same = torch.ones(4, 2)
    assert recall(same, same, 3) == 0 and recall(same, same, 4) == 1


@pytest.mark.parametrize("among", [0, 8])
def test_more_than_there_are(among: int) -> None:
    with pytest.raises(UserError, match="give 1 to 7"):
        recall(*vectors(0), 1, among)


def test_towers_of_a_checkpoint() -> None:
    config = TowerConfig(**TOWER)
    tower = Tower(config, build_encoder(config, 50, 3, None), 8, 3)
    weights = {f"towers.tokens.{name}": value for name, value in tower.state_dict().items()}
    checkpoint: Any = SimpleNamespace(
        path="x", manifest={"params": dict.fromkeys(weights)}, master=weights.__getitem__, fixed=dict
    )
    opened = open_towers(checkpoint, {"kind": "contrastive", "towers": [TOWER]})["tokens"]
    tokens, lengths = torch.randint(0, 50, (3, 5)), torch.tensor([5, 2, 0])
    given = tower.inputs(tokens, lengths, torch.device("cpu"))
    assert torch.equal(opened(**given), tower.eval()(**given))
    with pytest.raises(UserError, match="has no towers"):
        open_towers(checkpoint, {"kind": "gan"})


def test_a_result_is_shown_with_its_chance(capsys: pytest.CaptureFixture[str]) -> None:
    source = {"path": "runs/pairs", "step": 8, "parameters": 1000, "dtype": "fp32", "device": "cpu"}
    show_result({"source": source, "among": 20, "recall": {"image to tokens": {"1": 0.5, "5": 0.75}}})
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("image to tokens", "among 20", "0.750", "0.250"))


@pytest.mark.parametrize(
    ("asked", "why"),
    [({}, "nothing to evaluate"), ({"retrieval": "m", "text": ["t"]}, "are for different models")],
)
def test_what_cannot_be_asked(asked: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        evaluate(Request(source="runs/pairs", **asked))
