"""An adversary beside what makes images or sounds: patches judged real or made.

Hinge losses (Lim and Ye, https://arxiv.org/abs/1705.02894), feature matching (Salimans et al.,
https://arxiv.org/abs/1606.03498) and the adaptive weight of VQGAN (https://arxiv.org/abs/2012.09841, equation 7), here
with gradients with respect to what was made, and of the step before as a whole: then it is the same on any ranks and
accumulation. The penalty of steepness is R1 (Mescheder et al., https://arxiv.org/abs/1801.04406) by a difference in
place of its second derivative, which sharded weights do not allow (Lin et al., https://arxiv.org/abs/2501.08316,
section 3.4). B rows, C channels, S sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from millrace.engine.engines import Engines
from millrace.engine.twin import Twin, Weights, weights_of
from millrace.models.convolutions import Critic, mean_by_row, seeded_noise
from millrace.models.initial import module_seed
from millrace.pretrain.objectives.config import AdversaryConfig, CriticConfig

NAME = "adversary"  # of its engine
_MOST = 1e4  # what the adaptive weight is at most, as in VQGAN
_NEAR = 0.1  # standard deviation of the noise by which steepness is measured; with less, rounding is measured too
_NOISE = 0x9E3779B97F4A7C15  # by which its seeds differ from those of other noise of the same rows


class Pull(NamedTuple):
    """What the maker is told of a micro-batch."""

    gradient: Tensor  # of the loss with respect to what was made (B, C, *S)
    opinion: Tensor  # summed over rows
    matching: Tensor  # summed over rows


class Balance(nn.Module):
    """The adaptive weight, and the steps taken. It belongs into the maker's module, where checkpoints find it."""

    weight: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(1))  # nothing is known before the first step
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))


class Adversary:
    """Judges what is made, with the weights that its engine has at the step's start."""

    def __init__(
        self, config: CriticConfig, shape: tuple[int, int], seed: int, words: tuple[int, int] | None = None
    ) -> None:
        """`shape` and `words` as of a `Critic`."""

        def make() -> Critic:
            return Critic(shape, config.width, config.layers, config.scales, words)

        self._config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(module_seed(seed, NAME))
            self.module = make()
        self._twin = Twin(make)
        self._lent: Weights = {}
        self._squares = torch.zeros(2, dtype=torch.float64)  # of gradients: reconstruction's, adversary's

    def begin(self, engines: Engines) -> None:
        """Before a step's losses; call it on every rank."""
        self._lent = weights_of(engines[NAME].module)
        self._squares = torch.zeros(2, dtype=torch.float64, device=engines.world.device)

    def pull(self, real: Tensor, made: Tensor, good_B: Tensor, restoring: Tensor, balance: Balance) -> Pull:
        """Towards what it takes for real; `restoring` is the reconstruction's gradient with respect to `made`."""
        config = self._config
        assert isinstance(config, AdversaryConfig)
        leaf = made.detach().requires_grad_()
        opinions, features = self._twin(self._lent, leaf)
        opinion = -torch.stack([mean_by_row(each) for each in opinions]).mean(0)
        with torch.no_grad():
            _, aims = self._twin(self._lent, real)
        pairs = zip(features, aims, strict=True)
        matching = torch.stack([mean_by_row((a.float() - b.float()).abs()) for a, b in pairs]).mean(0)
        total = ((opinion + config.matching * matching) * good_B).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
        self._squares += torch.stack([g.double().square().sum() for g in (restoring, gradient)])
        gradient = gradient * (balance.weight * config.weight * (balance.steps >= config.start))
        return Pull(gradient, (opinion.detach() * good_B).sum(), (matching.detach() * good_B).sum())

    def opinion(self, made: Tensor, good_B: Tensor, words: Sequence[Tensor] = ()) -> Tensor:
        """Minus its opinion of what was made, summed over rows; its gradient reaches `made`, and nothing of its own."""
        opinions, _ = self._twin(self._lent, made, *words)
        return (-torch.stack([mean_by_row(each) for each in opinions]).mean(0) * good_B).sum()

    def judge(
        self, pair: tuple[Tensor, Tensor], view: Any, engines: Engines, words: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """The adversary's own loss of (real, made), summed over a view's good rows: with its penalty, and without."""
        signals = [each.detach() for each in pair]
        penalty = self._config.penalty if engines[NAME].module.training else 0.0
        if penalty:
            noise = seeded_noise(view.seeds ^ np.uint64(_NOISE), signals[0].shape[1:], signals[0].device)
            signals.append(signals[0] + _NEAR * noise)
        opinions, _ = engines[NAME].ds(torch.cat(signals), *(torch.cat([w] * len(signals)) for w in words))
        scales = [each.float().chunk(len(signals)) for each in opinions]
        hinges = [mean_by_row(F.relu(1 - a)) + mean_by_row(F.relu(1 + b)) for a, b, *_ in scales]
        good_B = torch.tensor(view.good, device=signals[0].device).float()
        judged = (torch.stack(hinges).mean(0) / 2 * good_B).sum()
        if not penalty:
            return judged, judged.detach()
        steep_B = torch.stack([mean_by_row((a - near).square()) for a, _, near in scales]).mean(0) / _NEAR**2
        return judged + penalty / 2 * (steep_B * good_B).sum(), judged.detach()

    @torch.no_grad()
    def end_step(self, balance: Balance, *, taken: bool) -> None:
        """The weight of the next step, from this one's gradients; on every rank."""
        if not taken:
            return
        if dist.is_initialized():
            dist.all_reduce(self._squares)
        restoring, gradient = self._squares.sqrt()
        balance.weight.copy_((restoring / (gradient + 1e-12)).clamp(max=_MOST))
        balance.steps += 1
