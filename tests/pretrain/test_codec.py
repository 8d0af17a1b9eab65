"""Codecs: every bottleneck trains the same at all ZeRO stages, ranks and micro-batches, and resumes to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from millrace.eval.heldout import evaluate
from tests.pretrain.samples_worker import BAD, LR, ROWS, objective_of, samples
from tests.pretrain.stages import HALF, STAGES, STEPS, Found

_SMALL: dict[str, Any] = {"widths": [8, 16], "strides": [2, 2], "latent": 4, "codes": 16}
_CRITIC = {"weight": 0.5, "width": 8, "layers": 2, "start": 2}


def _of(adversary: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    section = {"kind": "codec", "decay": 0.5, **({"adversary": adversary} if adversary else {})}
    return {"objective": section, "model": {"kind": "codec", "config": _SMALL | model}}


MEL = {"rate": 8000, "window": 64, "hop": 16, "bands": 16}
KINDS = {
    "vq": _of(_CRITIC, bottleneck="vq"),
    "fsq": _of(bottleneck="fsq", levels=[5, 4, 3]),
    "kl": _of(bottleneck="kl"),
    "none": _of(_CRITIC | {"scales": 2}, bottleneck="none"),
    "waveform": _of(_CRITIC, modality="audio", strides=[2, 4]),
    "mel": _of(modality="audio", mel=MEL),
}
KINKS = {"none": 7, "waveform": 4}  # steps before the first at which rounding decides
QUICK = ("vq", "kl")  # in every run of the tests
MIXED = [{**KINDS["vq"], "name": f"mixed {s}", "stage": s, "steps": 3, "micro": 2, "images": 3} for s in (0, 3)]
BF16 = {**KINDS["vq"], "name": "bf16", "stage": 2, "precision": "bf16"}


def learns(losses: list[float]) -> bool:
    return sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Found:
    kinds = {kind: KINDS[kind] for kind in QUICK}
    return Found(tmp_path_factory.mktemp("quick"), kinds, ("zero0", "zero3"), [BF16, *MIXED])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(tmp_path_factory.mktemp("codecs"), KINDS, STAGES)


@pytest.mark.parametrize("kind", QUICK)
def test_without_and_with_sharding(quick: Found, kind: str) -> None:
    quick.check(kind)
    assert learns(quick.losses(kind))


@pytest.mark.slow
@pytest.mark.timeout(1100)
@pytest.mark.parametrize("kind", KINDS)
def test_at_every_stage(found: Found, kind: str) -> None:
    found.check(kind, KINKS.get(kind, STEPS))
    assert learns(found.losses(kind))


def test_held_out_samples_are_measured_without_the_adversary() -> None:
    """Its figures are those of training: the held-out ones are the mean over good rows of what is restored."""
    objective: Any = objective_of(KINDS["vq"])
    module = objective.modules["model"]
    world = SimpleNamespace(device=torch.device("cpu"), sum=lambda *values: values)
    main = SimpleNamespace(module=module, forward=lambda view: module(**module.inputs(view, world.device)))
    engines: Any = SimpleNamespace(main=main, world=world, train=module.train)
    found = evaluate(objective, engines, [(samples(0, 0, 4), 0), (samples(0, 4, ROWS), 0)])
    good = [row for row in range(ROWS) if row != BAD]
    coded = module.eval()(samples(0, 0, ROWS).values["image"][good])
    restored = float((coded.made - coded.given).detach().abs().mean())
    assert found.averages.keys() == {"reconstruction", "bottleneck"}
    assert found.averages["reconstruction"] == pytest.approx(restored, rel=1e-5)


def test_what_follows_stays_exact_in_bf16(quick: Found) -> None:
    result, other = quick.results["bf16"], quick.results["vq 2 zero0 whole"]
    assert set(result["buffers"].values()) == {"torch.float32", "torch.int64"}
    assert [step[0] for step in result["found"]] == pytest.approx([step[0] for step in other["found"]], rel=0.1)


def test_samples_without_an_image_do_not_count(quick: Found) -> None:
    """Rank 1 has none at all, and neither rank hangs; the first loss is the mean over the three that are there."""
    found, other = (quick.results[f"mixed {stage}"]["found"] for stage in (0, 3))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(other), rtol=1e-4, atol=1e-6)
    module: Any = objective_of(KINDS["vq"]).modules["model"]
    coded = module(**module.inputs(samples(0, 0, 3), torch.device("cpu")))
    loss = (coded.made - coded.given).abs().flatten(1).mean(1) + 0.25 * coded.cost_B
    assert found[0][0] == pytest.approx(loss.mean().item(), rel=1e-4)


def test_equals_plain_torch(quick: Found) -> None:
    """The adversary's pull, its weight, its own loss and the codebook, by the papers' formulas on the whole batch."""
    result = quick.results["vq 2 zero3 whole"]
    for step, expected in zip(result["found"][:HALF], _reference(KINDS["vq"], HALF), strict=True):
        figures = dict(zip(result["figures"], step, strict=False))
        assert figures == pytest.approx(expected, rel=1e-3, abs=1e-5)


def _reference(sections: dict[str, Any], steps: int) -> Iterator[dict[str, float]]:
    objective: Any = objective_of(sections)
    module, critic = objective.modules["model"], objective.modules["adversary"]
    good = torch.tensor([row != BAD for row in range(ROWS)])
    optimisers = [torch.optim.AdamW(part.parameters(), LR) for part in (module, critic)]
    weight, book = 0.0, module.model.bottleneck
    uses, sums = torch.zeros(16), torch.zeros(16, 4)
    for number in range(steps):
        batch = samples(number, 0, ROWS)
        coded = module(**module.inputs(batch, torch.device("cpu")))
        given, made = coded.given[good], coded.made[good]
        restored, cost = (made - given).abs().flatten(1).mean(1).sum(), coded.cost_B[good].sum()
        (opinion,), features = critic(made)
        _, aims = critic(given)
        matching = sum((a - b.detach()).abs().flatten(1).mean(1).sum() for a, b in zip(features, aims, strict=True)) / 2
        opinion = -opinion.flatten(1).mean(1).sum()
        norms = [
            torch.autograd.grad(loss, made, retain_graph=True)[0].norm() for loss in (restored, opinion + matching)
        ]
        pull = weight * 0.5 * (opinion + matching) if number >= 2 else 0.0
        grads = torch.autograd.grad((restored + 0.25 * cost + pull) / len(given), list(module.parameters()))
        (real,), _ = critic(given)
        (fake,), _ = critic(made.detach())
        judged = (F.relu(1 - real) + F.relu(1 + fake)).flatten(1).mean(1).sum() / 2
        others = torch.autograd.grad(judged / len(given), list(critic.parameters()))
        for part, found in ((module, grads), (critic, others)):
            for param, grad in zip(part.parameters(), found, strict=True):
                param.grad = grad
        for optimiser in optimisers:
            optimiser.step()
        weight = float(norms[0] / norms[1])
        with torch.no_grad():
            latent = F.normalize(coded.latent[good], dim=-1)
            hot = F.one_hot(coded.index_BL[good].flatten(), 16).float()
            uses = 0.5 * uses + 0.5 * hot.sum(0)
            sums = 0.5 * sums + 0.5 * hot.T @ latent.flatten(0, 1)
            typical = hot.sum() / 16
            fresh = iter(_candidates(latent, batch.seeds[good.numpy()]))
            for code in range(16):
                if uses[code] < typical / 10 and (vector := next(fresh, None)) is not None:
                    uses[code], sums[code] = typical, vector * typical
            book.directions.copy_(F.normalize(sums, dim=1))
        values = {"reconstruction": restored, "bottleneck": cost, "adversary": judged, "opinion": opinion}
        values |= {"loss": restored + 0.25 * cost, "matching": matching}
        yield {name: float(value.detach()) / len(given) for name, value in values.items()}


def _candidates(latent_BLD: torch.Tensor, seeds: np.ndarray) -> list[torch.Tensor]:
    """Four of every row, rows in the order of their seeds."""
    order = sorted(range(len(seeds)), key=lambda row: int(seeds[row]))
    length = latent_BLD.shape[1]
    return [latent_BLD[row, at] for row in order for at in np.random.default_rng(seeds[row]).integers(0, length, 4)]
