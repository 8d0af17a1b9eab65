"""Which checkpoints stay: by a reference that looks at each alone, and in folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.core.units import Duration
from millrace.engine.checkpoint.retention import Saved, prune, stays
from millrace.engine.config import CheckpointConfig

LOSSES = st.none() | st.floats(0, 9)
STEPS = st.dictionaries(st.integers(1, 60), st.tuples(st.booleans(), LOSSES), max_size=20)


def stays_alone(one: Saved, everything: list[Saved], config: CheckpointConfig) -> bool:
    newer = [s for s in everything if s.step > one.step]
    if not newer:
        return True
    least = config.keep or 2
    if len(newer) < least and len([s for s in everything if not s.ephemeral]) < least:
        return True
    if one.ephemeral:
        return False
    if config.keep == 0 or len([s for s in newer if not s.ephemeral]) < config.keep:
        return True
    if config.keep_every and one.step % config.keep_every == 0:
        return True
    if one.heldout is None:
        return False
    rivals = [s for s in everything if not s.ephemeral and s.heldout is not None]
    return len([s for s in rivals if (s.heldout, s.step) < (one.heldout, one.step)]) < config.keep_best


@given(STEPS, st.integers(0, 4), st.integers(0, 7), st.integers(0, 3))
def test_each_stays_as_the_rules_say(
    found: dict[int, tuple[bool, float | None]], keep: int, keep_every: int, keep_best: int
) -> None:
    config = CheckpointConfig(keep=keep, keep_every=keep_every, keep_best=keep_best)
    saved = [Saved(step, ephemeral, heldout) for step, (ephemeral, heldout) in found.items()]
    kept = stays(saved, config)
    assert {s.step for s in saved if s.step in kept} == {s.step for s in saved if stays_alone(s, saved, config)}


def test_removing_step_by_step_keeps_what_removing_at_the_end_would(tmp_path: Path) -> None:
    """A run prunes after every save: what went must not be needed later."""
    config = CheckpointConfig(keep=2, keep_every=4, keep_best=1)
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: None, 5: 2.5, 6: 2.6, 7: 2.7, 8: None, 9: 2.8}
    everything = []
    for step, loss in losses.items():
        everything.append(Saved(step, step == 7, loss))
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        (path / "trainer.json").write_text(json.dumps({"ephemeral": step == 7, "heldout": loss}))
        prune(tmp_path, config)
        there = {int(path.name[5:]) for path in tmp_path.iterdir()}
        assert there == stays(everything, config) & set(losses)
    assert there == {4, 5, 8, 9}


def test_a_stop_early_in_a_run_leaves_two_to_fall_back_to() -> None:
    """Found by benchmarks/soak.py: the first ordinary one replaced the stop's, was flipped, and nothing verified."""
    saved = [Saved(15, ephemeral=True), Saved(20)]
    assert stays(saved, CheckpointConfig(keep=2)) == {15, 20}
    assert stays([*saved, Saved(40)], CheckpointConfig(keep=2)) == {20, 40}
    assert stays(saved, CheckpointConfig(keep=1)) == {20}


def test_one_that_cannot_be_read_is_an_ordinary_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "step-00000002" / "trainer.json").write_text("{")
    prune(tmp_path, CheckpointConfig(keep=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("key", ["keep", "keep_every", "keep_best"])
def test_negative_numbers_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"checkpoint.{key} = -1: give 0 or more"):
        CheckpointConfig(**{key: -1})  # type: ignore[arg-type]


def test_between_is_steps_or_time() -> None:
    with pytest.raises(UserError, match="checkpoint.between = '5 tokens': give steps or a time"):
        CheckpointConfig(between=Duration(5, "tokens"))
