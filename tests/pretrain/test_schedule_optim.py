"""Schedules against closed forms; the optimiser's groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from millrace.core.errors import UserError
from millrace.core.units import Duration
from millrace.pretrain.optim import AdamW
from millrace.pretrain.schedule import Constant, Cosine, Point, WarmupStableDecay

STEPS = Duration(100, "steps")


def factors(schedule, duration=STEPS):
    return [schedule.factor(Point(step), duration) for step in range(100)]


def test_warmup_stable_decay():
    got = factors(WarmupStableDecay(warmup=Duration(10, "steps"), decay=0.5, floor=0.1))
    for step, factor in enumerate(got):
        share = 1.0 if step <= 50 else 1 - (step - 50) / 50
        assert factor == pytest.approx(min(1.0, (step + 1) / 10) * (0.1 + 0.9 * share))


def test_sqrt_decay():
    got = factors(WarmupStableDecay(warmup=Duration(0, "steps"), decay=1.0, decay_shape="sqrt"))
    assert got[25] == pytest.approx(1 - math.sqrt(0.25))


def test_cosine_equals_torch():
    got = factors(Cosine(warmup=Duration(0, "steps")))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    for factor in got:
        assert factor == pytest.approx(reference.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        reference.step()


def test_durations_in_tokens_and_seconds():
    schedule = WarmupStableDecay(warmup=Duration(10, "s"), decay=0.5)
    assert schedule.factor(Point(3, 750, 20.0), Duration(1000, "tokens")) == pytest.approx(0.5)
    assert schedule.factor(Point(3, 750, 5.0), Duration(1000, "tokens")) == pytest.approx(0.25)


def test_the_first_step_of_a_run_measured_in_time_moves():
    assert Constant(warmup=Duration(60, "s")).factor(Point(), Duration(600, "s")) > 0


@pytest.mark.parametrize("bad", [{"floor": 2.0}, {"decay": -0.1}, {"warmup": Duration(1, "epochs")}])
def test_bad_values_are_named(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        WarmupStableDecay(**bad)


def test_weight_decay_on_matrices_only():
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    optimizer = AdamW(weight_decay=0.3).build(model)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decays) == 5
    for param in model.parameters():
        assert decays[id(param)] == (0.3 if param.ndim >= 2 else 0.0)


def test_frozen_parameters_are_left_out():
    model = nn.Linear(4, 3)
    model.weight.requires_grad_(False)
    optimizer = AdamW().build(model)
    assert [p for g in optimizer.param_groups for p in g["params"]] == [model.bias]
