"""The samples of every step of a run that is never interrupted, as each arm would draw them."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

from faulty import corpus
from faulty.account import merge
from faulty.arms import RANKS, Arm
from faulty.job import Job
from millrace.core.ledger import read


def ours(folder: Path, steps: int) -> list[list[Hashable]]:
    """From the loader alone: spans (sample, start, end) of all ranks."""
    from millrace.data.config import DataConfig
    from millrace.data.loader import build_loader

    config = DataConfig(manifest=str(folder / "manifest"), sequence_length=corpus.LENGTH, prefetch=0)
    micro = corpus.BATCH // RANKS
    with build_loader(config, seed=0, batch_rows=corpus.BATCH, micro_batch=micro, rank=0, world=RANKS) as loader:
        return [[tuple(span) for span in next(loader).spans] for _ in range(steps)]


def trainer(arm: Arm, timeout: float = 600.0) -> list[list[Hashable]]:
    """From the Trainer's own loop on the same ranks, with nothing computed in it."""
    arm.folder.mkdir(parents=True)
    with Job(arm.command(), arm.environment(0), arm.folder / "log.txt") as job:
        if job.launcher.wait(timeout):
            raise RuntimeError((arm.folder / "log.txt").read_text()[-2000:])
    return [record["samples"] for record in merge(logs(arm)) if record["event"] == "step"]


def logs(arm: Arm) -> list[list[dict]]:
    """Every rank's records."""
    return [read(arm.ledger.with_name(f"log-{rank}.jsonl")) for rank in range(RANKS)]
