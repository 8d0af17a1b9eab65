"""An adversary beside what makes images or sounds: patches judged real or made.

Hinge losses (Lim and Ye, https://arxiv.org/abs/1705.02894), feature matching (Salimans et al.,
https://arxiv.org/abs/1606.03498) and the adaptive weight of VQGAN (https://arxiv.org/abs/2012.09841, equation 7), here
with gradients with respect to what was made, and of the step before as a whole: then it is the same on any ranks and
accumulation. B rows, C channels, S sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from millrace.engine.engines import Engines
from millrace.engine.twin import Twin, Weights, weights_of
from millrace.models.convolutions import Critic, mean_by_row
from millrace.models.initial import module_seed
from millrace.pretrain.objectives.config import AdversaryConfig, CriticConfig

NAME = "adversary"  # of its engine
_MOST = 1e4  # what the adaptive weight is at most, as in VQGAN


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
        self, pair: tuple[Tensor, Tensor], good_B: Tensor, engines: Engines, words: Sequence[Tensor] = ()
    ) -> Tensor:
        """The adversary's own loss of (real, made), summed over rows."""
        opinions, _ = engines[NAME].ds(torch.cat([part.detach() for part in pair]), *(torch.cat([w, w]) for w in words))
        found = torch.zeros_like(good_B)
        for each in opinions:
            a, b = each.chunk(2)
            found = found + (mean_by_row(F.relu(1 - a)) + mean_by_row(F.relu(1 + b))) / (2 * len(opinions))
        return (found * good_B).sum()

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
