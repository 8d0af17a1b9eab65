"""Where a run goes on: weights, moments and counts of a checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millrace.core.console import say, warn
from millrace.core.ledger import last_event
from millrace.data.state import LoaderState
from millrace.engine.checkpoint.read import Checkpoint, load_checkpoint, open_newest, remove_leftovers
from millrace.engine.engines import Engines
from millrace.pretrain.schedule import Point

if TYPE_CHECKING:
    from millrace.pretrain.loop import Parts


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint holds beside the engine's state; all at the start for a run that has none."""

    found: Checkpoint | None = None
    rejected: list[dict[str, str]] = field(default_factory=list)  # newer ones, and why they are not used
    unfinished: list[int] = field(default_factory=list)  # steps whose save was cut off
    seconds: float = 0.0  # that it took to verify and load
    point: Point = field(default_factory=Point)
    loader: LoaderState | None = None
    guard: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        """None for a run at its start."""
        return self.found.step if self.found else None


def resume(folder: Path, engine: Engines) -> Resumed:
    """Load the newest checkpoint in `folder` that verifies, on every rank, and remove what a kill left behind.

    Raises:
        UserError: there are checkpoints and none verifies, or it fits another model.
    """
    began, world = time.perf_counter(), engine.world
    unfinished = world.on_main(lambda: remove_leftovers(folder))
    found, rejected = open_newest(folder, world)
    if found is None:
        return Resumed(unfinished=unfinished)
    load_checkpoint(found, engine.adapter)
    trainer = found.json("trainer")
    return Resumed(
        found=found,
        rejected=rejected,
        unfinished=unfinished,
        seconds=time.perf_counter() - began,
        point=Point(trainer["step"], trainer["tokens"], trainer["seconds"]),
        loader=LoaderState.from_dict(trainer["loader"]),
        guard=trainer.get("guard", {}),
    )


def tell_resumed(parts: Parts, resumed: Resumed) -> None:
    """Into the ledger: where the run goes on, what was rejected on the way, and how many steps are computed again."""
    if not parts.engine.world.main:
        return
    for step in resumed.unfinished:
        warn(f"the save of step {step} was cut off before it was whole; it is not used")
    if resumed.found is None:
        return
    step, before = parts.point.step, last_event(parts.rundir.ledger, "step")
    again = max(0, before["step"] - step) if before else 0
    parts.tracker.log(
        "resume", step=step, **{"from": str(resumed.found.path)}, rejected=resumed.rejected,
        unfinished=resumed.unfinished, again=again, seconds=resumed.seconds,
    )  # fmt: skip
    if again:
        last = f"the run ended after step {step + again}, its last checkpoint is of step {step}"
        say(f"{last}: {again} steps are computed again")
