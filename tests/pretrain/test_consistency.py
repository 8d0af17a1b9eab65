"""Few labels (FixMatch): the same on any ranks, micro-batches and ZeRO stages, resumed to the bit, by its formulas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from millrace.core.errors import UserError
from tests.pretrain.few_labels import HELDOUT, SECTION, labels_of, samples, scenario
from tests.pretrain.samples_worker import BAD, LR, ROWS, objective_of
from tests.pretrain.stages import STAGES, STEPS, Found

_CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
KINDS = {
    "few": scenario(),
    "convolutions": scenario(encoder={"modality": "image", "kind": "convnextv2", "config": _CONVNEXT}),
    "labels alone": scenario(weight=0.0),
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(tmp_path_factory.mktemp("quick"), {"few": KINDS["few"]}, ("zero0", "zero3"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(tmp_path_factory.mktemp("few"), KINDS, STAGES)


def _check(found: Found, kind: str) -> None:
    """What is trained, and the running mean of the weights, by which held-out rows are judged."""
    found.check(kind)
    first = found.results[f"{kind} 1 zero0 whole"]["heldout"]
    for stage in found.stages:
        assert found.results[f"{kind} 2 {stage} whole"]["heldout"] == pytest.approx(first, rel=1e-4)
    for stage in ("zero0", "zero3"):
        whole, rest = (found.results[f"{kind} 2 {stage} {how}"]["heldout"] for how in ("whole", "rest"))
        assert rest == whole


def test_without_and_with_sharding(quick: Found) -> None:
    _check(quick, "few")


@pytest.mark.slow
@pytest.mark.timeout(1100)
@pytest.mark.parametrize("kind", KINDS)
def test_at_every_stage(found: Found, kind: str) -> None:
    _check(found, kind)


def test_equals_plain_torch(quick: Found) -> None:
    """The paper's formulas (3) and (4) on the whole batch, and the mean of the weights judging at the end."""
    result, reference = quick.results["few 2 zero3 whole"], _reference(KINDS["few"], STEPS)
    assert result["figures"] == ["loss", "supervised", "unlabelled", "confident", "accuracy"]
    for step, expected in zip(result["found"], reference, strict=False):
        assert step[:5] == pytest.approx(expected, rel=1e-3)
    heldout = result["heldout"]
    assert [heldout[name] for name in ("loss", "accuracy")] == pytest.approx(next(reference), rel=1e-3)
    shares = [step[3] for step in result["found"]]
    assert 0 < sum(shares) / STEPS < 1  # some are sure, some are not


def _reference(sections: dict[str, Any], steps: int) -> Iterator[list[float]]:
    """Figures of every step, then [loss, accuracy] of the held-out batch by the running mean."""
    objective: Any = objective_of(sections)
    model, mean = objective.modules["model"].model, objective.modules["model"].mean.module
    optimiser = torch.optim.AdamW(model.parameters(), LR)
    rows = [row for row in range(ROWS) if row != BAD]
    for number in range(steps):
        batch, labels = samples(number, 0, ROWS), labels_of(number)
        weak, strong = (model(batch.values[name]) for name in ("weak", "strong"))
        named, unnamed = ([row for row in rows if (labels[row] >= 0) == has] for has in (True, False))
        targets = torch.tensor([labels[row] for row in named])
        supervised = F.cross_entropy(weak[named], targets)
        q = weak[unnamed].detach().softmax(-1)
        sure = (q.max(-1).values >= SECTION["threshold"]).float()
        unlabelled = (sure * F.cross_entropy(strong[unnamed], q.argmax(-1), reduction="none")).mean()
        loss = supervised + SECTION["weight"] * unlabelled
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for slow, fast in zip(mean.parameters(), model.parameters(), strict=True):
                slow.copy_(SECTION["decay"] * slow + (1 - SECTION["decay"]) * fast)
        right = (weak[named].argmax(-1) == targets).float().mean()
        yield [x.item() for x in (loss, supervised, unlabelled, sure.mean(), right)]
    targets = torch.tensor(labels_of(HELDOUT))[rows]
    logits = mean(samples(HELDOUT, 0, ROWS).values["weak"][rows])
    yield [F.cross_entropy(logits, targets).item(), (logits.argmax(-1) == targets).float().mean().item()]


def test_without_weight_strong_views_are_not_asked_for() -> None:
    objective = objective_of(KINDS["labels alone"])
    view = objective.view(samples(0, 0, 4))
    del view.samples.values["strong"]
    module: Any = objective.modules["model"]
    assert objective.figures == ("loss", "supervised", "accuracy")
    assert module(**module.inputs(view, torch.device("cpu"))).strong_BK is None


def test_samples_without_a_picture_do_not_count() -> None:
    objective, batch = objective_of(KINDS["few"]), samples(HELDOUT, 0, 4)
    every = objective.view(batch)
    assert every.labelled == sum(batch.good) > 2
    batch.present["strong"] = [good and row != 1 for row, good in enumerate(batch.good)]
    view = objective.view(batch)
    assert view.good == batch.present["strong"] and view.labelled == every.labelled - batch.good[1]


def test_an_unknown_name_is_told() -> None:
    objective, batch = objective_of(KINDS["few"]), samples(HELDOUT, 0, 4)
    batch.values["tokens"][2, 0] = 11  # type: ignore[index]
    with pytest.raises(UserError, match="a sample's text is '11', which is none of objective.classes"):
        objective.view(batch)


def test_what_is_held_out_needs_labels() -> None:
    objective = objective_of(KINDS["few"])
    with pytest.raises(UserError, match="a held-out sample has no text"):
        objective.measure(objective.view(samples(0, 0, 4)), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({"classes": ["a"]}, "give two classes or more"),
        ({"classes": ["a", "b", "a"]}, "give every class once"),
        ({"threshold": 1.5}, "a threshold from 0 to 1"),
        ({"encoder": {"modality": "text"}}, "give modality = 'image' or 'audio'"),
    ],
)
def test_bad_sections(section: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        objective_of(scenario(**section))
