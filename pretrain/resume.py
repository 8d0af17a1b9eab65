"""Where a run goes on: weights, moments and counts of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from millrace.data.state import LoaderState
from millrace.engine.checkpoint.read import Checkpoint, load_checkpoint
from millrace.engine.engine import Engine
from millrace.pretrain.schedule import Point


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
