"""The gradient of a contrastive batch: one process with all of it, against any ranks, micro-batches and ZeRO stages."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.pretrain.contrastive_worker import BAD, ROWS, build, samples
from tests.ranks import run_world

WAYS = [(world, micro) for world in (1, 2) for micro in (ROWS // world, 2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, results = tmp_path_factory.mktemp("contrastive"), {}
    for world in (1, 2):
        jobs = [
            {"name": f"{loss} {world} {micro} zero{stage}", "loss": loss, "micro": micro, "stage": stage}
            for loss in ("softmax", "sigmoid")
            for ranks, micro in WAYS
            for stage in range(4)
            if ranks == world
        ]
        path = folder / f"{world}.json"
        path.write_text(json.dumps({"scenarios": jobs}))
        out = run_world(Path(__file__).with_name("contrastive_worker.py"), world, [str(path)])
        line = next(line for line in out.splitlines() if line.startswith("RESULT "))
        results |= {r["name"]: r for r in json.loads(line[7:])}
    return results


@pytest.fixture(scope="module", params=["softmax", "sigmoid"])
def reference(request: pytest.FixtureRequest) -> tuple[str, float, dict[str, torch.Tensor]]:
    """(kind, mean loss, gradient by parameter) of the whole batch, in plain torch by the papers' formulas."""
    kind = request.param
    module: Any = build(kind).modules["model"]
    features, temperature = module(**module.inputs(samples(0, ROWS), torch.device("cpu")))
    keep = [number for number in range(ROWS) if number != BAD]
    total, pairs = torch.zeros(()), list(combinations(features, 2))
    for a, b in pairs:
        logits = features[a][keep] @ features[b][keep].T * temperature[0].exp() + temperature[1]
        if kind == "softmax":
            right = torch.arange(len(keep))
            total = total + (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
        else:
            signs = 2 * torch.eye(len(keep)) - 1
            total = total - F.logsigmoid(signs * logits).sum() / len(keep)
    loss = total / len(pairs)
    loss.backward()
    return (
        kind,
        loss.item(),
        {name: param.grad.flatten() for name, param in module.named_parameters() if param.grad is not None},
    )


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize(("world", "micro"), WAYS)
def test_gradient_is_that_of_the_whole_batch(found: Any, reference: Any, world: int, micro: int, stage: int) -> None:
    kind, loss, gradient = reference
    result = found[f"{kind} {world} {micro} zero{stage}"]
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert gradient and gradient.keys() <= result["gradient"].keys()
    for name, values in result["gradient"].items():
        expected = gradient.get(name, torch.zeros(len(values)))
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-6, rtol=1e-4)


def test_pairs_of_which_one_is_missing_do_not_count() -> None:
    batch = samples(0, 4)
    names = list(batch.values)
    batch.present = {names[0]: [True, False, True, True], names[1]: [True, True, False, True]}
    good = [one and row not in (1, 2) for row, one in enumerate(batch.good)]
    assert build("softmax").view(batch).good == good and any(good)


def test_a_bad_sample_counts_nothing(found: Any) -> None:
    assert len({round(result["accuracy"], 9) for name, result in found.items() if name.startswith("softmax")}) == 1
