"""A run that is killed and resumed, beside a twin that is not: what they trained on and their losses must be equal."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.core.errors import UserError
from millrace.core.ledger import read

STEPS, CHECKPOINT_EVERY, KILL_AFTER = 14, 5, 8
_START_SECONDS = 300.0


@dataclass(frozen=True)
class Proof:
    """`killed_at` is the last step before SIGKILL, `resumed_from` the checkpoint's; all figures were equal."""

    killed_at: int
    resumed_from: int
    steps: int
    samples: int


def kill_in_the_middle(command: Sequence[str], ledger: Path) -> int:
    """Start a run, SIGKILL all of its processes after step `KILL_AFTER`, and return the last step in its ledger.

    Raises:
        UserError: the run ended by itself.
    """
    run = subprocess.Popen(command)
    try:
        until = time.monotonic() + _START_SECONDS
        while _last_step(ledger) < KILL_AFTER:
            if run.poll() is not None or time.monotonic() > until:
                raise UserError(f"the run that was to be killed ended by itself (exit code {run.poll()}); see {ledger}")
            time.sleep(0.02)
    finally:
        _kill_tree(run)
    return _last_step(ledger)


def _last_step(ledger: Path) -> int:
    steps = [r["step"] for r in read(ledger) if r["event"] == "step"] if ledger.exists() else []
    return max(steps, default=0)


def _kill_tree(run: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and its descendants, and wait for their end; all are stopped first, so that none reacts."""
    import psutil

    try:
        whole = psutil.Process(run.pid)
        processes = [whole, *whole.children(recursive=True)]
    except psutil.NoSuchProcess:
        processes = []
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
    run.wait()
    psutil.wait_procs(processes, timeout=10)


def compare(unkilled: Path, killed: Path, killed_at: int) -> Proof:
    """Check every step that the killed run took, the recomputed ones too, against its twin.

    Raises:
        UserError: a step's samples or loss differ, or a step is missing; nothing is said to be close enough.
    """
    expected = {r["step"]: r for r in read(unkilled) if r["event"] == "step"}
    records = read(killed)
    found = [r for r in records if r["event"] == "step"]
    resumed = next((r["step"] for r in records if r["event"] == "resume"), None)
    if resumed is None:
        raise UserError(f"the killed run did not resume from a checkpoint; see {killed}")
    missing = expected.keys() - {r["step"] for r in found}
    if missing or not expected:
        raise UserError(f"the resumed run lacks steps {sorted(missing)} of its twin; see {killed} and {unkilled}")
    for record in found:
        twin = expected[record["step"]]
        for what in ("samples", "loss_hex"):
            if record[what] != twin[what]:
                raise UserError(
                    f"resuming is not exact: step {record['step']} has {what} {_short(record[what])} in {killed} and "
                    f"{_short(twin[what])} in {unkilled}"
                )
    return Proof(killed_at, resumed, len(expected), sum(len(r["samples"]) for r in expected.values()))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "…"


def pretrain_command(arguments: Sequence[str]) -> list[str]:
    """`millrace pretrain` with this interpreter."""
    return [sys.executable, "-m", "millrace.launch", "pretrain", *arguments]
