"""A batch whose gradients were discarded leaves no trace: the run equals, to the bit, one that never saw it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.test_checkpoint_worlds import WAYS

# In the middle, first, and two on end; a loss that is not finite on one rank, and one that is 100 times too large.
CASES = {"nan": {"2": "nan"}, "large": {"0": "100"}, "twice": {"1": "inf", "2": "100"}}
QUICK = ("zero0", "zero2-offload", "zero3", "zero1-bf16")


def both(scenarios: Any, ways: tuple[str, ...], case: str) -> None:
    """Run each way with the case's batches spoilt, and without having seen them; compare."""
    spoilt = CASES[case]
    jobs: list[dict[str, Any]] = []
    for name in ways:
        common = {"overrides": WAYS[name], "steps": 5}
        jobs += [{"name": f"{name} spoilt", "spoilt": spoilt, **common}]
        jobs += [{"name": f"{name} unseen", "unseen": [int(number) for number in spoilt], **common}]
    found = scenarios(2, jobs, timeout=300)
    for name in ways:
        one, other = found[f"{name} spoilt"], found[f"{name} unseen"]
        assert one["losses"] == other["losses"] and len(one["losses"]) == 5 - len(spoilt), name
        assert one["norms"] == other["norms"] and one["after"] == other["after"], name


def test_equals_a_run_that_never_saw_it(scenarios: Any) -> None:
    both(scenarios, QUICK, "twice")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_stage_equals_a_run_that_never_saw_it(scenarios: Any, case: str) -> None:
    both(scenarios, tuple(WAYS), case)
