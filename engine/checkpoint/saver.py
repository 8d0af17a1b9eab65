"""Saving while training goes on: a step pays for one copy of what its rank owns.

The copy goes to host memory (pinned beside a GPU) that is used again by every save. A thread writes it and issues no
collective; once all ranks have written, which the loop learns with a step's other figures, rank 0 commits.
"""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from millrace.engine.checkpoint.joint import AnyAdapter
from millrace.engine.checkpoint.write import (
    Content,
    Slice,
    commit,
    facts,
    fixed_tensors,
    owned_slices,
    step_name,
    write_rank,
)
from millrace.engine.distributed import World
from millrace.engine.owner import Ownership, taken_over


@dataclass(frozen=True)
class Written:
    """A checkpoint that is visible now: its step and size, and the seconds until then, and for which steps waited."""

    step: int
    bytes: int
    seconds: float
    stall: float


class Saver:
    """Writes checkpoints into `folder`, one at a time; every method is called on every rank alike.

    With `background` a save goes on behind the training steps; without it `begin` returns when all is written.
    """

    def __init__(
        self, folder: Path, adapter: AnyAdapter, world: World, owner: Ownership | None = None, *, background: bool
    ) -> None:
        self._folder, self._adapter, self._world, self._owner = folder, adapter, world, owner
        self._background = background
        self._copies: dict[str, torch.Tensor] = {}
        self._pending: _Pending | None = None
        self.took = 0.0  # seconds that this rank copied and wrote the last one for

    def needs(self, another: bool) -> float:
        """Seconds until all that was begun is written, and `another`, if they take as long as the last."""
        going = time.perf_counter() - self._pending.began if self._pending and self._pending.alive() else self.took
        return max(0.0, self.took - going) + (self.took if another else 0.0)

    @property
    def pending(self) -> bool:
        """Whether a save was begun and is not visible yet."""
        return self._pending is not None

    @property
    def writing(self) -> bool:
        """Whether this rank still writes; `finish` does not wait once no rank does."""
        return self._pending is not None and self._pending.alive()

    def begin(self, step: int, extra: dict[str, Any]) -> None:
        """Copy the state and start to write `step-N`; an earlier save must be finished.

        `extra` holds JSON-able content by file name ("trainer": {...} → trainer.json) and, under "files", the text
        files that later stages need beside the weights ({"config.toml": "…", "model/config.json": "…"}).
        """
        assert self._pending is None, "finish the save before"
        began = time.perf_counter()
        content = Content(
            rank=self._world.rank,
            slices=self._copied() if self._background else list(owned_slices(self._adapter)),
            fixed=fixed_tensors(self._adapter),
            extra=extra,
            facts=facts(self._adapter, step),
        )
        number = self._owner.number if self._owner else 0
        temporary = self._folder / f"{step_name(step)}.tmp-{number}"
        self._pending = _Pending(temporary, content, began)
        if not self._background:
            self._pending.wait()
        self._pending.stall += time.perf_counter() - began

    def _copied(self) -> list[Slice]:
        """The slices in host memory of our own; the optimiser may step when this returns."""
        pin = self._world.device.type == "cuda"
        slices = []
        for piece in owned_slices(self._adapter):
            if piece.key not in self._copies:
                self._copies[piece.key] = torch.empty(piece.values.shape, dtype=piece.values.dtype, pin_memory=pin)
            copy = self._copies[piece.key]
            copy.copy_(piece.values, non_blocking=pin)
            slices.append(Slice(piece.key, piece.start, copy))
        if pin:
            torch.cuda.synchronize()
        return slices

    def finish(self) -> Written | None:
        """Wait until all ranks have written, and commit; None where nothing was begun.

        Raises:
            OSError: a rank could not write, a full disk for one; on every rank, with `step-N` not visible and the
                temporary folder removed.
            UserError: the run directory was taken over meanwhile, and with it what was half written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        waited = time.perf_counter()
        pending.wait()
        self.took = pending.took
        size = [0]
        final = self._folder / step_name(pending.content.facts["step"])

        def make_visible() -> None:
            size[0] = commit(pending.temporary, final, pending.content, self._owner)

        try:
            self._raise_everywhere(pending.error)
            self._raise_everywhere(_attempt(make_visible) if self._world.main else None)
        except OSError:
            if self._world.main:
                shutil.rmtree(pending.temporary, ignore_errors=True)
            raise
        now = time.perf_counter()
        return Written(pending.content.facts["step"], size[0], now - pending.began, pending.stall + now - waited)

    def _raise_everywhere(self, error: str | None) -> None:
        """If any rank failed, fail on all: one rank alone would leave the others waiting in a collective."""
        every = self._world.gather_objects((error, self._owner is not None and self._owner.lost()))
        failed = [(rank, e) for rank, (e, _) in enumerate(every) if e]
        if failed and any(lost for _, lost in every):  # the new owner removed what was half written
            raise taken_over(self._folder.parent)
        if failed:
            rank, text = failed[0]
            raise OSError(
                f"could not write the checkpoint on rank {rank}: {text}; free space or fix the disk and rerun"
            )


class _Pending:
    """A save under way: this rank's files are written by a thread."""

    def __init__(self, temporary: Path, content: Content, began: float) -> None:
        self.temporary, self.content, self.began, self.stall = temporary, content, began, 0.0
        self.error: str | None = None
        self.took = 0.0
        self._thread = threading.Thread(target=self._write, name="millrace-save", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        try:
            write_rank(self.temporary, self.content)
        except Exception as error:  # a thread's would be lost
            self.error = f"{error}" if isinstance(error, OSError) else repr(error)
        self.took = time.perf_counter() - self.began

    def alive(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()


def _attempt(action: Any) -> str | None:
    try:
        action()
    except OSError as error:
        return f"{error}"
    return None


def save_checkpoint(
    folder: Path, step: int, adapter: AnyAdapter, world: World, extra: dict[str, Any], owner: Ownership | None = None
) -> Written:
    """Write `folder/step-N` from all ranks, and return when it is visible; see `Saver`."""
    saver = Saver(folder, adapter, world, owner, background=False)
    saver.begin(step, extra)
    saved = saver.finish()
    assert saved is not None
    return saved
