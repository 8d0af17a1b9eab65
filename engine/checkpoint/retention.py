"""Which checkpoints stay."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from millrace.engine.checkpoint.read import list_checkpoints
from millrace.engine.checkpoint.write import remove
from millrace.engine.config import CheckpointConfig


@dataclass(frozen=True)
class Saved:
    """A checkpoint: its step, whether it only bridges the time to the next one, and the held-out loss there."""

    step: int
    ephemeral: bool = False
    heldout: float | None = None


def stays(saved: Sequence[Saved], config: CheckpointConfig) -> set[int]:
    """Steps that stay: the newest of all, the newest `keep`, multiples of `keep_every`, and the `keep_best`.

    One that only bridges the time to the next stays until there is a newer one; but while there are not yet `keep`
    others, the newest `keep` of all stay, so that a damaged newest one is not the only one.
    """
    steps = sorted(s.step for s in saved if not s.ephemeral)
    best = sorted((s.heldout, s.step) for s in saved if s.heldout is not None and not s.ephemeral)
    kept = set(steps[-config.keep :] if config.keep else steps)
    kept |= {step for step in steps if config.keep_every and step % config.keep_every == 0}
    kept |= {step for _, step in best[: config.keep_best]}
    newest = sorted(s.step for s in saved)[-_least(config) :]
    return kept | set(newest if len(steps) < _least(config) else newest[-1:])


def _least(config: CheckpointConfig) -> int:
    return config.keep or 2


def prune(folder: Path, config: CheckpointConfig, busy: Collection[int] = ()) -> None:
    """Remove the checkpoints in `folder` that need not stay; those of `busy` steps are being read."""
    paths = {int(path.name[5:]): path for path in list_checkpoints(folder)}
    kept = stays([read_saved(path) for path in paths.values()], config).union(busy)
    for step, path in paths.items():
        if step not in kept:
            remove(path)


def read_saved(path: Path) -> Saved:
    """What is known of the checkpoint `step-N`; one that cannot be read is an ordinary one."""
    step = int(path.name[5:])
    try:
        trainer = json.loads((path / "trainer.json").read_text())
    except (OSError, ValueError):
        return Saved(step)
    return Saved(step, bool(trainer.get("ephemeral")), trainer.get("heldout"))
