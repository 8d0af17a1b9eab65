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
    for number, step in enumerate(steps):
        last = taken[-window:]
        above = [
            value - max(statistics.fmean(column) + sigma * statistics.pstdev(column), far * statistics.fmean(column))
            for value, column, far in zip(step, zip(*last, strict=True), (0, 5), strict=True)
        ] if len(last) == window else []  # fmt: skip
        skipped = bool(guard.judge(number, 1, *step))
        assert any(abs(excess) < 1e-6 for excess in above) or skipped == any(excess > 0 for excess in above)
        if not skipped:
            taken.append(step)
            assert guard.taken == number


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_is_never_taken(value: float, place: int) -> None:
    guard = Guard(GuardConfig(sigma=0))
    figures = [1.0, 1.0]
    figures[place] = value
    assert f"{('loss', 'grad_norm')[place]} is {value}" == guard.judge(1, 1, *figures)
    assert not guard.judge(2, 1, 1.0, 1e30)  # finite, and nothing else is asked
    assert guard.state()["loss"] == [1.0] and guard.state()["grad_norm"] == [1e30] and guard.taken == 2


def filled(**options: float) -> Guard:
    """A guard that has seen four steps with a loss of about 2."""
    guard = Guard(GuardConfig(window=4, **options))  # type: ignore[arg-type]
    for step, loss in enumerate((2.0, 2.1, 1.9, 2.0), 1):
        assert not guard.judge(step, 1, loss, 1.0)
    return guard


def test_a_spike_is_named_and_does_not_move_the_window() -> None:
    guard = filled()
    before = guard.state()
    assert guard.judge(5, 1, 200.0, 1.0) == "loss 200 is more than 6 deviations (0.071) above 2"
    assert guard.state() == before | {"skipped": 1, "calm": 0}
    assert not guard.judge(6, 1, 2.05, 1.0) and guard.skipped == 0 and guard.taken == 6


def test_a_gradient_must_be_far_above_the_mean_too() -> None:
    guard = filled()  # its norms are all 1
    assert not guard.judge(5, 1, 2.0, 4.9)
    assert filled().judge(5, 1, 2.0, 5.1) == "grad_norm 5.1 is more than 6 deviations (0) above 1"


def test_another_stage_of_the_data_has_another_loss() -> None:
    guard = filled()
    assert guard.judge(5, 1, 9.0, 1.0) and not guard.judge(5, 2, 9.0, 1.0)
    assert guard.state()["loss"] == [9.0]


def test_goes_on_from_a_checkpoint_to_the_bit() -> None:
    config = GuardConfig(window=5)
    losses = [1 / 3 + n / 7 for n in range(9)] + [50.0, 0.9]
    whole, half = Guard(config), Guard(config)
    expected = [whole.judge(n, 1, loss, loss**2) for n, loss in enumerate(losses)]
    found = [half.judge(n, 1, loss, loss**2) for n, loss in enumerate(losses[:6])]
    rest = Guard(config, json.loads(json.dumps(half.state())))
    found += [rest.judge(n, 1, loss, loss**2) for n, loss in enumerate(losses[6:], 6)]
    assert found == expected and rest.state() == whole.state()


def test_too_many_on_end_are_lost_and_a_return_brings_back_the_window() -> None:
    guard = filled(skips=3)
    saved = guard.state()
    assert not guard.judge(5, 1, 2.02, 1.0)
    for step in (6, 7, 8):
        assert not guard.lost and guard.judge(step, 1, math.nan, 1.0)
    assert guard.lost
    guard.go_back(saved)
    assert not guard.lost and guard.state() == saved | {"returns": 1, "calm": 0}
    for step in (9, 10, 11):
        assert not guard.judge(step, 1, 2.0, 1.0) and guard.returns == 1
    assert not guard.judge(12, 1, 2.0, 1.0) and guard.returns == 0  # a whole window of good steps


def test_a_return_to_an_earlier_stage_judges_nothing_by_its_window() -> None:
    guard = filled()
    saved = guard.state()
    assert not guard.judge(5, 2, 9.0, 1.0)
    guard.go_back(saved)
    assert not guard.judge(6, 2, 9.0, 1.0)


def test_never_lost_where_no_number_is_given() -> None:
    never = Guard(GuardConfig(skips=0))
    assert all(never.judge(step, 1, math.nan, 1.0) for step in range(50)) and not never.lost


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="guard.window = 1"):
        GuardConfig(window=1)
