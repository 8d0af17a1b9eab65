"""Generators against an adversary: the same at all ZeRO stages, ranks and micro-batches, resumed to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from millrace.core.errors import UserError
from millrace.models.convolutions import seeded_noise
from tests.pretrain.samples_worker import BAD, LR, ROWS, objective_of, samples
from tests.pretrain.stages import HALF, STAGES, Found

_SIZES: dict[str, Any] = {"widths": [8, 16], "strides": [2, 2], "grid": 4, "noise": 8}
_SECTION = {"kind": "gan", "decay": 0.5, "adversary": {"width": 8, "layers": 2, "penalty": 0.5}}


def _of(**model: Any) -> dict[str, Any]:
    return {"objective": _SECTION, "model": {"kind": "generator", "config": _SIZES | model}}


KINDS = {
    "words": _of(words=8),
    "image": _of(),
    "waveform": _of(modality="audio", grid=50, strides=[2, 4]),
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(tmp_path_factory.mktemp("quick"), {"words": KINDS["words"]}, ("zero0", "zero3"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(tmp_path_factory.mktemp("gans"), KINDS, STAGES)


def test_without_and_with_sharding(quick: Found) -> None:
    quick.check("words")


def test_samples_without_an_image_do_not_count() -> None:
    assert objective_of(KINDS["words"]).view(samples(0, 0, 8, 3)).good == [True] * 3 + [False] * 5


@pytest.mark.slow
@pytest.mark.timeout(1100)
@pytest.mark.parametrize("kind", KINDS)
def test_at_every_stage(found: Found, kind: str) -> None:
    found.check(kind)


def test_equals_plain_torch(quick: Found) -> None:
    """Hinge losses of both by their formulas, on the whole batch."""
    result = quick.results["words 2 zero3 whole"]
    for step, expected in zip(result["found"][:HALF], _reference(KINDS["words"], HALF), strict=True):
        assert step[:2] == pytest.approx(expected, rel=1e-3)


def _reference(sections: dict[str, Any], steps: int) -> Iterator[list[float]]:
    objective: Any = objective_of(sections)
    module, critic = objective.modules["model"], objective.modules["adversary"]
    good = torch.tensor([row != BAD for row in range(ROWS)])
    optimisers = [torch.optim.AdamW(part.parameters(), LR) for part in (module.maker, critic)]
    for number in range(steps):
        batch = samples(number, 0, ROWS)
        given = module.inputs(batch, torch.device("cpu"))
        words = [given["tokens_BT"][good], given["mask_BT"][good]]
        made = module.maker(**given)[good]
        real = batch.values["image"][good].movedim(-1, 1).float() / 127.5 - 1
        fooled = -critic(made, *words)[0][0].flatten(1).mean(1).sum() / len(real)
        losses = [
            F.relu(1 + sign * critic(x.detach(), *words)[0][0]).flatten(1).mean(1)
            for sign, x in ((-1, real), (1, made))
        ]
        judged = (losses[0] + losses[1]).sum() / 2 / len(real)
        noise = seeded_noise(batch.seeds[good.numpy()] ^ np.uint64(0x9E3779B97F4A7C15), real.shape[1:], real.device)
        near = critic(real + 0.1 * noise, *words)[0][0]
        steep = ((critic(real, *words)[0][0] - near) / 0.1).square().flatten(1).mean(1).sum() / len(real)
        pairs = [(part, torch.autograd.grad(loss, list(part.parameters())))
                 for part, loss in ((module.maker, fooled), (critic, judged + 0.5 / 2 * steep))]  # fmt: skip
        for part, grads in pairs:
            for param, grad in zip(part.parameters(), grads, strict=True):
                param.grad = grad
        for optimiser in optimisers:
            optimiser.step()
        yield [fooled.item(), judged.item()]


def test_the_running_mean_makes_what_is_evaluated() -> None:
    objective: Any = objective_of(KINDS["words"])
    module = objective.modules["model"]
    given = module.inputs(samples(0, 0, 4), torch.device("cpu"))
    before = module(**given)
    with torch.no_grad():
        for param in module.maker.parameters():
            param += 0.1
    assert not torch.equal(module(**given), before)
    module.eval()
    assert torch.equal(module(**given), before)  # both began with the same weights
    module.follow(0.0)
    assert torch.equal(module(**given), module.train()(**given))


def test_the_mean_moves_faster_at_first() -> None:
    objective: Any = objective_of(KINDS["words"])
    module = objective.modules["model"]
    with torch.no_grad():
        for param in module.maker.parameters():
            param.fill_(1.0)
        for param in module.model.parameters():
            param.fill_(0.0)
    expected, bias = 0.0, module.model.start.bias
    for step in range(1, 5):
        decay = min(0.4, (1 + step) / (10 + step))
        expected = decay * expected + 1 - decay
        module.follow(0.4)
        torch.testing.assert_close(bias, torch.full_like(bias, expected))


def test_the_penalty_is_that_of_a_gradient() -> None:
    """A small difference stands for R1's squared gradient of one opinion, in the mean over directions."""
    objective: Any = objective_of(KINDS["words"])
    critic = objective.modules["adversary"].double()
    told = [torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)]
    real = torch.rand(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    opinion = critic(real, *told)[0][0]
    squares = [torch.autograd.grad(each, real, retain_graph=True)[0].square().sum() for each in opinion.flatten()]
    noise = seeded_noise(range(0, 8000, 2), real.shape[1:], real.device).double()
    with torch.no_grad():
        near = critic(real + 0.1 * noise, *(word.expand(len(noise), -1) for word in told))[0][0]
    found = ((near - opinion) / 0.1).square().mean()
    assert float(found.detach()) == pytest.approx(float(torch.stack(squares).detach().mean()), rel=0.1)


def test_words_change_what_is_made_and_judged() -> None:
    objective: Any = objective_of(KINDS["words"])
    module, critic = objective.modules["model"], objective.modules["adversary"]
    given = module.inputs(samples(0, 0, 4), torch.device("cpu"))
    other = given | {"tokens_BT": (given["tokens_BT"] + 1) % 50}
    made = module(**given)
    assert (module(**other) - made).abs().max() > 1e-3
    opinions = [critic(made, told["tokens_BT"], told["mask_BT"])[0][0] for told in (given, other)]
    assert not torch.equal(*opinions)


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        (_of(modality="video"), "give image or audio"),
        ({**_of(), "model": {"kind": "codec"}}, "trains model.kind = 'generator', not 'codec'"),
    ],
)
def test_bad_sections(sections: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        objective_of(sections)


def test_other_sizes_than_the_samples_are_told() -> None:
    from millrace.models.convolutions import signal_of
    from millrace.pretrain.objectives.gan import check_size

    objective: Any = objective_of(_of(grid=5))
    module, batch = objective.modules["model"], samples(0, 0, 2)
    made = module(**module.inputs(batch, torch.device("cpu")))
    with pytest.raises(UserError, match="samples are 3 x 16 x 16 and the generator makes 3 x 20 x 20"):
        check_size(signal_of(module.real(batch)), made)
