"""Uploads of checkpoints, as the loop sees them: begun, told about, and waited for at the end."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from millrace.core.console import say, warn
from millrace.core.errors import DONE
from millrace.core.rundir import RunDir
from millrace.engine.checkpoint.read import list_checkpoints
from millrace.engine.checkpoint.retention import read_saved
from millrace.engine.checkpoint.upload import Uploader
from millrace.engine.distributed import World
from millrace.engine.signals import StopRequest

if TYPE_CHECKING:
    from millrace.pretrain.loop import Parts

_DONE_SECONDS, _STOP_SECONDS = 600.0, 30.0  # for what is under way when a run is done; else
_MARGIN_SECONDS = 15.0  # before the end of a job, which must come to its end by itself to be queued again


def begin_uploads(url: str, rundir: RunDir, world: World, step: int) -> Uploader | None:
    """On rank 0, where `url` is not empty; goes on with the newest checkpoint up to `step`, if an earlier start did
    not finish it."""
    if not url or not world.main:
        return None
    uploader = Uploader(url, rundir)
    for path in list_checkpoints(rundir.checkpoints):
        saved = read_saved(path)
        if saved.step <= step and not saved.ephemeral:
            uploader.offer(path)
            break
    return uploader


def tell_uploads(parts: Parts) -> None:
    """What happened since the last call, into the ledger; what failed, also to the user."""
    for found in parts.uploader.told() if parts.uploader else ():
        parts.tracker.log("upload", **{key: value for key, value in asdict(found).items() if value != ""})
        if found.why:
            warn(f"the checkpoint of step {found.step} is not in {found.to}: {found.why}; the run goes on")


def end_uploads(parts: Parts, outcome: int) -> None:
    """Wait for what is under way, within bounds; call it when the run's outcome is written."""
    uploader = parts.uploader
    if uploader is None:
        return
    began = time.monotonic()
    if uploader.steps:
        say(f"waiting for the checkpoint of step {max(uploader.steps)} to be in {uploader.url}")
    with StopRequest() as stop:
        while uploader.steps:
            patient = outcome == DONE and not stop and not uploader.failing
            waited = time.monotonic() - began
            if waited > (_DONE_SECONDS if patient else _STOP_SECONDS) or stop.left() < _MARGIN_SECONDS:
                break
            time.sleep(0.05)
    tell_uploads(parts)
    if steps := uploader.steps:
        why = "it was not finished when the run ended; the same command goes on with it"
        parts.tracker.log("upload", step=max(steps), to=uploader.url, seconds=time.monotonic() - began, why=why)
        warn(f"the checkpoint of step {max(steps)} is not in {uploader.url}: {why}")
