"""Checkpoints of a run as the loop asks for them, and its end."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from millrace.core.console import say
from millrace.core.errors import CONTINUE
from millrace.engine.checkpoint.read import list_checkpoints
from millrace.engine.checkpoint.retention import prune
from millrace.engine.checkpoint.write import step_name
from millrace.engine.signals import StopRequest
from millrace.pretrain.schedule import Point
from millrace.pretrain.uploads import tell_uploads

if TYPE_CHECKING:
    from millrace.pretrain.loop import Parts


def save(parts: Parts, point: Point, *, heldout: float | None = None, ephemeral: bool = False) -> None:
    """Begin to write a checkpoint, on every rank; the one before is finished first."""
    finish_save(parts, point)
    parts.watch.enter("save", point.step)
    trainer = {
        "step": point.step,
        "tokens": point.tokens,
        "seconds": point.seconds,
        "heldout": heldout,
        "ephemeral": ephemeral,
        "guard": parts.guard.state(),
        **parts.identity,
    }
    parts.saver.begin(point.step, {"trainer": trainer, "files": parts.files})


def finish_save(parts: Parts, point: Point, *, writing: bool = False) -> None:
    """Make the checkpoint that was begun visible, on every rank, and remove old ones; nothing while it is `writing`."""
    tell_uploads(parts)
    if writing or not parts.saver.pending:
        return
    parts.watch.enter("save", point.step)
    saved = parts.saver.finish()
    assert saved is not None
    uploader, folder = parts.uploader, parts.rundir.checkpoints
    if parts.engine.world.main:
        prune(folder, parts.config.checkpoint, uploader.steps if uploader else ())
    if uploader:
        uploader.offer(folder / step_name(saved.step))
    parts.tracker.log("checkpoint", **asdict(saved))


def too_late(parts: Parts, stop: StopRequest, unsaved: bool) -> str:
    """Why a save is not waited for, or empty: on some rank the time left is shorter than the last one took.

    A job that ends by itself is queued again; one that is killed while it saves need not be.
    """
    every = parts.engine.world.gather_objects((parts.saver.needs(unsaved), stop.left()))
    needs, left = max(every, key=lambda rank: rank[0] - rank[1])
    if needs <= left:
        return ""
    visible = list_checkpoints(parts.rundir.checkpoints)
    newest = visible[0].name if visible else "its start"
    return (
        f"asked to stop by {stop.name or 'another rank'} with {max(left, 0):.0f} s left, and a save takes "
        f"{needs:.0f} s: the run goes on from {newest}; a longer slurm.grace avoids that"
    )


def end(parts: Parts, point: Point, code: int, why: str) -> int:
    """Write down how this start of the run ended, on every rank; returns the outcome's code."""
    parts.watch.enter("eval", point.step)
    parts.tracker.log("end", step=point.step, outcome=code, why=why)
    if parts.engine.world.main:
        parts.rundir.write_outcome(code, why, point.step)
        say(f"step {point.step}: {why}" + ("; the same command continues" if code == CONTINUE else ""))
    parts.engine.world.barrier()
    return code
