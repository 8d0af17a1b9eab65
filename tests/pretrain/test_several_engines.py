"""Objectives with several engines, a teacher and a codebook, at every ZeRO stage against plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.pretrain.toy import DECAY, Generator, Toy, follow_codes
from tests.pretrain.toy_worker import ROWS, batch
from tests.ranks import run_world

STAGES = {"zero0": {"stage": 0}, "zero1": {"stage": 1}, "zero2": {"stage": 2}, "zero3": {"stage": 3}}
STAGES["zero3-thr0"] = {"stage": 3, "threshold": 0}
STEPS = 6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Any]:
    """(world, scenario) → result."""
    folder = tmp_path_factory.mktemp("toy")
    results = {}
    for world in (2, 1):
        jobs: list[dict[str, Any]] = []
        for name, stage in STAGES.items():
            jobs.append({"name": f"{name} whole", **stage, "steps": STEPS})
            jobs.append({"name": f"{name} spoilt", **stage, "steps": STEPS, "spoilt": [2, 3]})
            jobs.append({"name": f"{name} unseen", **stage, "steps": STEPS, "unseen": [2, 3]})
            if world == 2:
                jobs.append({"name": f"{name} half", **stage, "steps": 3, "save": str(folder / name)})
            load = str(folder / name / "step-00000003")
            jobs.append({"name": f"{name} rest", **stage, "steps": STEPS, "first": 3, "load": load})
            load = str(folder / "zero1" / "step-00000003")
            jobs.append({"name": f"{name} of zero1", **stage, "steps": STEPS, "first": 3, "load": load})
        jobs.sort(key=lambda job: "load" in job)
        path = folder / f"{world}.json"
        path.write_text(json.dumps({"scenarios": jobs}))
        out = run_world(Path(__file__).with_name("toy_worker.py"), world, [str(path)])
        line = next(line for line in out.splitlines() if line.startswith("RESULT "))
        results |= {(world, r["name"]): r for r in json.loads(line[7:])}
    return results


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """The same in plain torch, on the whole batch: losses and the tensors that no optimiser steps."""
    toy = Toy.build(None)
    generator, adversary = toy.modules["model"], toy.modules["adversary"]
    assert isinstance(generator, Generator)
    student, teacher = generator.student, generator.teacher.module
    optimisers = [torch.optim.AdamW(student.parameters(), 0.05), torch.optim.AdamW(adversary.parameters(), 0.025)]
    losses = []
    for number in range(STEPS):
        x = batch(number)
        y, aim, nearest = generator(x)
        generated = ((y - x) ** 2).sum() + ((y - aim) ** 2).sum() - 0.1 * adversary(y).sum()
        judged = F.relu(1 - adversary(x)).sum() + F.relu(1 + adversary(y.detach())).sum()
        grads = torch.autograd.grad(generated / ROWS, list(student.parameters()))
        others = torch.autograd.grad(judged / ROWS, list(adversary.parameters()))
        for module, given in ((student, grads), (adversary, others)):
            for param, grad in zip(module.parameters(), given, strict=True):
                param.grad = grad
        square = sum(float((g.double() ** 2).sum()) for g in (*grads, *others))
        hot = F.one_hot(nearest, 16).double()
        for optimiser in optimisers:
            optimiser.step()
        follow_codes(generator.codes, torch.cat([hot.sum(0)[:, None], hot.T @ y.detach().double()], 1))
        with torch.no_grad():
            for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.lerp_(theirs, 1 - DECAY)
        losses.append([generated.item(), judged.item(), square])
    fixed = {n: p for n, p in generator.named_parameters() if not p.requires_grad} | {"codes": generator.codes}
    return {"losses": losses, "fixed": fixed}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", STAGES)
class TestEveryStage:
    def test_equals_plain_torch(self, found: Any, reference: Any, name: str, world: int) -> None:
        whole = found[world, f"{name} whole"]
        torch.testing.assert_close(torch.tensor(whole["losses"]), torch.tensor(reference["losses"]), rtol=1e-5, atol=0)
        assert whole["fixed"].keys() == reference["fixed"].keys()
        for tensor, value in reference["fixed"].items():
            torch.testing.assert_close(torch.tensor(whole["fixed"][tensor]), value, rtol=1e-5, atol=1e-6)

    def test_a_step_that_is_not_taken_was_never_seen(self, found: Any, name: str, world: int) -> None:
        spoilt, unseen = (found[world, f"{name} {how}"] for how in ("spoilt", "unseen"))
        assert {k: v for k, v in spoilt.items() if k != "name"} == {k: v for k, v in unseen.items() if k != "name"}

    def test_continued(self, found: Any, name: str, world: int) -> None:
        whole, rest = found[world, f"{name} whole"], found[world, f"{name} rest"]
        if world == 2:  # as it was written
            assert rest["losses"] == whole["losses"][3:]
            assert (rest["digest"], rest["fixed"]) == (whole["digest"], whole["fixed"])
        other = found[world, f"{name} of zero1"]
        for continued in (rest, other):
            torch.testing.assert_close(
                torch.tensor(continued["losses"]), torch.tensor(whole["losses"][3:]), rtol=1e-5, atol=0
            )
