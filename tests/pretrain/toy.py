"""An objective with everything that one may have: a generator and an adversary, a teacher and a codebook.

x (B, 8) is reconstructed through the nearest of 16 codes, which follow their samples; the adversary tells it from x,
and a teacher's reconstruction is pulled towards. One file, and a line in each table of `millrace.pretrain.objectives`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from millrace.core.config import option
from millrace.engine.engines import Engines
from millrace.engine.teacher import Teacher
from millrace.engine.twin import Twin, weights_of
from millrace.pretrain.objectives.base import Loss, Objective, Setting

DECAY = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyConfig:
    """Options of the toy."""

    kind: Literal["toy"] = option("toy", "which objective")


class Generator(nn.Module):
    """Encoder, codebook and decoder; their teacher is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(8, 33), nn.GELU(), nn.Linear(33, 8))
        self.teacher = Teacher(copy.deepcopy(self.student))
        self.register_buffer("codes", torch.randn(16, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction, the teacher's, number of the nearest code)."""
        y = self.student(x)
        nearest = torch.cdist(y.detach().float(), self.codes).argmin(1)
        return y, self.teacher(x), nearest


def adversary() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))


class Toy(Objective):
    figures = ("loss", "adversary", "max_output")

    def __init__(self) -> None:
        super().__init__({"model": Generator(), "adversary": adversary()}, {"adversary": 0.5})
        self.twin = Twin(adversary)
        self.sums: Tensor | None = None

    @classmethod
    def build(cls, setting: Setting | None) -> Toy:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls()

    def losses(self, micros: Sequence[Any], engines: Engines) -> Iterator[Loss]:
        lent = weights_of(engines["adversary"].module)
        self.sums = torch.zeros(16, 9, dtype=torch.float64)
        for number, x in enumerate(micros):
            last = number == len(micros) - 1
            y, aim, nearest = engines["model"].ds(x)
            hot = F.one_hot(nearest, 16).double()
            self.sums += torch.cat([hot.sum(0)[:, None], hot.T @ y.detach().double()], 1)
            fooled = self.twin(lent, y).sum()
            value = ((y - x) ** 2).sum() + ((y - aim) ** 2).sum() - 0.1 * fooled
            found = {"loss": value.detach(), "max_output": y.detach().max()}
            yield Loss(value, found, last)
            judged = engines["adversary"].ds(torch.cat([x, y.detach()]))
            real, made = judged.chunk(2)
            value = F.relu(1 - real).sum() + F.relu(1 + made).sum()
            yield Loss(value, {"adversary": value.detach()}, last, "adversary")

    def end_step(self, engines: Engines, *, taken: bool) -> None:
        sums, self.sums = self.sums, None
        if not taken or sums is None:
            return
        if dist.is_initialized():
            dist.all_reduce(sums)
        generator: Any = engines["model"].module
        follow_codes(generator.codes, sums)
        generator.teacher.follow(generator.student, DECAY)


@torch.no_grad()
def follow_codes(codes: Tensor, sums: Tensor) -> None:
    """Codes that had samples move towards their mean."""
    count = sums[:, :1]
    codes.copy_(torch.where(count > 0, 0.9 * codes + 0.1 * (sums[:, 1:] / count.clamp(min=1)).float(), codes))
