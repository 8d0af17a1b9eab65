"""Where a run goes on: weights, moments and counts of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from millrace.core.console import say
from millrace.core.ledger import last_event
from millrace.data.state import LoaderState
from millrace.engine.checkpoint.read import Checkpoint, load_checkpoint
from millrace.engine.engine import Engine
from millrace.pretrain.schedule import Point

if TYPE_CHECKING:
    from millrace.pretrain.loop import Parts


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint holds beside the engine's state; all at the start for a run that has none."""

    point: Point = field(default_factory=Point)
    loader: LoaderState | None = None
    guard: dict[str, Any] = field(default_factory=dict)


def resume(found: Checkpoint | None, engine: Engine) -> Resumed:
    """Load `found` into the engine, on every rank, and give the rest of it."""
    if found is None:
        return Resumed()
    load_checkpoint(found, engine.adapter)
    trainer = found.json("trainer")
    point = Point(trainer["step"], trainer["tokens"], trainer["seconds"])
    return Resumed(point, LoaderState.from_dict(trainer["loader"]), trainer.get("guard", {}))


def tell_resumed(parts: Parts, found: Checkpoint, rejected: list[dict[str, str]]) -> None:
    """Into the ledger: where the run goes on, what was rejected on the way, and how many steps are computed again."""
    if not parts.engine.world.main:
        return
    step, before = parts.point.step, last_event(parts.rundir.ledger, "step")
    again = max(0, before["step"] - step) if before else 0
    parts.tracker.log("resume", step=step, **{"from": str(found.path)}, rejected=rejected, again=again)
    if again:
        last = f"the run ended after step {step + again}, its last checkpoint is of step {step}"
        say(f"{last}: {again} steps are computed again")
