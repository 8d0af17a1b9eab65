"""Learning-rate schedules as functions of progress."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from millrace.core.config import option
from millrace.core.errors import UserError
from millrace.core.units import Duration

SCHEDULES = {
    "wsd": "millrace.pretrain.schedule:WarmupStableDecay",
    "cosine": "millrace.pretrain.schedule:Cosine",
    "constant": "millrace.pretrain.schedule:Constant",
}


@dataclass(frozen=True)
class Point:
    """How far a run is: optimiser steps taken, targets trained on, seconds of training."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def fraction(self, of: Duration) -> float:
        """The share of `of` that has passed, from 0; above 1 when it is over."""
        done = {"steps": self.step, "tokens": self.tokens, "s": self.seconds}[of.unit]
        return done / max(of.value, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Warmed:
    warmup: Duration = option(Duration(100, "steps"), "linear warm-up: steps, tokens or a time")
    floor: float = option(0.0, "the last learning rate as a share of optim.lr")

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise UserError(f"schedule.floor = {self.floor}: give a share of optim.lr between 0 and 1")
        if self.warmup.unit == "epochs":
            raise UserError(f"schedule.warmup = '{self.warmup}': give steps, tokens or a time")

    def factor(self, point: Point, duration: Duration) -> float:
        """What optim.lr is multiplied by for the step that starts at `point`."""
        # The first step must not be one of learning rate zero, hence step + 1.
        ahead = Point(point.step + 1, point.tokens, point.seconds)
        warm = min(1.0, ahead.fraction(self.warmup)) if self.warmup.value else 1.0
        share = self.shape(min(1.0, point.fraction(duration)))
        return max(warm, 1e-3) * (self.floor + (1 - self.floor) * share)

    def shape(self, done: float) -> float:
        """1 at the plateau to 0 at the end, for the share `done` of training."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupStableDecay(_Warmed):
    """Warm-up, a plateau, and a decay over the last part (https://arxiv.org/abs/2404.06395)."""

    kind: Literal["wsd"] = option("wsd", "which schedule")
    decay: float = option(0.2, "share of training that decays")
    decay_shape: Literal["linear", "sqrt"] = option("linear", "sqrt: 1 - sqrt of the decayed share")

    def __post_init__(self) -> None:
        _Warmed.__post_init__(self)
        if not 0 <= self.decay <= 1:
            raise UserError(f"schedule.decay = {self.decay}: give a share of training between 0 and 1")

    def shape(self, done: float) -> float:
        if done <= 1 - self.decay:
            return 1.0
        share = (done - (1 - self.decay)) / self.decay
        return 1 - (math.sqrt(share) if self.decay_shape == "sqrt" else share)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cosine(_Warmed):
    """Warm-up and half a cosine (https://arxiv.org/abs/1608.03983)."""

    kind: Literal["cosine"] = option("cosine", "which schedule")

    def shape(self, done: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant(_Warmed):
    """Warm-up, then constant."""

    kind: Literal["constant"] = option("constant", "which schedule")

    def shape(self, done: float) -> float:
        return 1.0
