"""The arms: how each is started, and where it keeps its checkpoints and its log."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

from faulty import corpus
from millrace.core.errors import DONE, STOP
from millrace.core.rundir import RunDir

RANKS = 2
BENCHMARKS = Path(common.ROOT) / "benchmarks"
# Short deadlines, but above what a first step or a save takes while the machine does something else.
WATCHDOG = {"start": 120, "first": 60, "step": 30, "collective": 30, "data": 30, "save": 60, "eval": 60}


@dataclass(frozen=True)
class Settings:
    """What all arms share: the folders, steps between checkpoints, seconds of grace after SIGTERM."""

    folder: Path
    corpus: Path
    every: int
    grace: float


@dataclass(frozen=True)
class Arm:
    """`python -m MODULE ARGUMENTS` as two ranks of torchrun; `ledger` is rank 0's log of starts and steps."""

    name: str
    module: str
    arguments: list[str]
    folder: Path  # of this arm: orders, outputs, and below it the run
    ledger: Path
    checkpoints: Path
    grace: float

    def command(self) -> list[str]:
        """The launcher's."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
        return [*launcher, "-m", self.module, *self.arguments]

    def environment(self, start: int) -> dict[str, str]:
        """Alike for all arms: torchrun passes SIGTERM on, and waits for the ranks as long as the grace period is."""
        path = os.pathsep.join(filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH", ""))))
        return os.environ | {
            "PYTHONPATH": path, "SOAK_FOLDER": str(self.folder), "SOAK_START": str(start), "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(max(1, common.cores() // RANKS)), "TOKENIZERS_PARALLELISM": "false",
            "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(self.grace)),
        }  # fmt: skip

    def over(self, since: float) -> bool:
        """Whether the run says itself that it needs no further start (millrace: outcome 0 or 93)."""
        return RunDir(self.folder / "run").outcome_since(since) in (DONE, STOP)


def ours(settings: Settings, name: str) -> Arm:
    """millrace, saving behind the steps, with its watchdog and its guard."""
    folder = settings.folder / name
    wanted: dict[str, Any] = {
        "run.dir": folder, "run.name": "run", "run.sample_ids": "true", "data.manifest": settings.corpus / "manifest",
        "data.sequence_length": corpus.LENGTH, "model.kind": "qwen3", "train.batch": corpus.BATCH,
        "train.micro_batch": corpus.BATCH // RANKS, "train.duration": "1000000 steps", "optim.clip": corpus.CLIP,
        "optim.lr": corpus.LEARNING_RATE, "schedule.kind": "constant", "schedule.warmup": "0 steps",
        "engine.zero_stage": 2, "engine.precision": "fp32", "checkpoint.every": f"{settings.every} steps",
        "checkpoint.keep": 2, "eval.every": "1000000 steps",
    }  # fmt: skip
    wanted |= {f"model.config.{key}": json.dumps(value) for key, value in corpus.SIZES.items()}
    wanted |= {f"watchdog.{section}": f"{seconds} s" for section, seconds in WATCHDOG.items()}
    return Arm(
        name=name, module="faulty.rank_ours", arguments=[f"{key}={value}" for key, value in wanted.items()],
        folder=folder, ledger=folder / "run" / "ledger.jsonl", checkpoints=folder / "run" / "checkpoints",
        grace=settings.grace,
    )  # fmt: skip


def trainer(settings: Settings, name: str, *, jit: bool = False, order: int = 0) -> Arm:
    """transformers' Trainer; `jit` lets it save on SIGTERM, `order` only lists the samples of so many steps."""
    folder = settings.folder / name
    run = folder / "run"
    job = {"folder": str(run), "corpus": str(settings.corpus), "every": settings.every, "jit": jit, "order": order}
    return Arm(
        name=name, module="faulty.rank_trainer", arguments=[json.dumps(job)], folder=folder,
        ledger=run / "log-0.jsonl", checkpoints=run, grace=settings.grace,
    )  # fmt: skip


ARMS: dict[str, Callable[[Settings, str], Arm]] = {
    "millrace": ours,
    "trainer": trainer,
    "trainer-jit": lambda settings, name: trainer(settings, name, jit=True),
}
