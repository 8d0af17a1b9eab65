"""Which steps are not taken."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.engine.guard import Guard, GuardConfig

STEPS = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), max_size=40)
BAD = (math.nan, math.inf, -math.inf)


@given(STEPS, st.integers(2, 8), st.floats(0.5, 8))
def test_equals_mean_and_deviation_of_the_steps_that_were_taken(
    steps: list[tuple[float, float]], window: int, sigma: float
) -> None:
    guard, taken = Guard(GuardConfig(window=window, sigma=sigma)), []
    for step in steps:
        last = taken[-window:]
        expected = len(last) == window and any(
            value > statistics.fmean(column) + sigma * statistics.pstdev(column) + 1e-9
            for value, column in zip(step, zip(*last, strict=True), strict=True)
        )
        close = len(last) == window and any(
            abs(value - statistics.fmean(column) - sigma * statistics.pstdev(column)) < 1e-6
            for value, column in zip(step, zip(*last, strict=True), strict=True)
        )
        skipped = bool(guard.judge(*step))
        assert close or skipped == expected
        if not skipped:
            taken.append(step)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_is_never_taken(value: float, place: int) -> None:
    guard = Guard(GuardConfig(sigma=0))
    figures = [1.0, 1.0]
    figures[place] = value
    assert f"{('loss', 'grad_norm')[place]} is {value}" == guard.judge(*figures)
    assert not guard.judge(1.0, 1e30)  # finite, and nothing else is asked
    assert guard.history() == {"loss": [1.0], "grad_norm": [1e30]}


def test_a_spike_is_named_and_does_not_move_the_window() -> None:
    guard = Guard(GuardConfig(window=4))
    for loss in (2.0, 2.1, 1.9, 2.0):
        assert not guard.judge(loss, 1.0)
    before = guard.history()
    assert guard.judge(200.0, 1.0) == "loss 200 is more than 6 deviations (0.071) above 2"
    assert guard.history() == before and guard.skipped == 1
    assert not guard.judge(2.05, 1.0) and guard.skipped == 0


def test_goes_on_from_a_checkpoint_to_the_bit() -> None:
    config = GuardConfig(window=5)
    losses = [1 / 3 + n / 7 for n in range(9)] + [50.0, 0.9]
    whole, half = Guard(config), Guard(config)
    expected = [whole.judge(loss, loss**2) for loss in losses]
    found = [half.judge(loss, loss**2) for loss in losses[:6]]
    rest = Guard(config, json.loads(json.dumps(half.history())))
    found += [rest.judge(loss, loss**2) for loss in losses[6:]]
    assert found == expected and rest.history() == whole.history()


def test_too_many_on_end_are_lost() -> None:
    guard = Guard(GuardConfig(skips=3))
    for number in range(3):
        assert not guard.lost and guard.judge(math.nan, 1.0), number
    assert guard.lost and guard.forget() == {"skipped": 3} and not guard.lost
    never = Guard(GuardConfig(skips=0))
    assert all(never.judge(math.nan, 1.0) for _ in range(50)) and not never.lost


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="guard.window = 1"):
        GuardConfig(window=1)
