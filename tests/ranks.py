"""Running a script as several ranks, with a deadline, leaving no process behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(**extra: str) -> dict[str, str]:
    """This environment for child processes: one thread a rank, and none of a launcher's variables."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID")
    kept = {k: v for k, v in os.environ.items() if k not in drop and not k.startswith("ACCELERATE_")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | extra


def run_world(script: Path, world: int, arguments: Sequence[str] = (), timeout: float = 240) -> str:
    """Run `script` as `world` ranks; returns rank 0's stdout.

    Raises:
        AssertionError: a rank failed, or the deadline passed; the message holds every rank's output.
    """
    codes, outputs = launch_world(script, world, arguments, timeout)
    joined = "\n".join(f"--- rank {r}\n{o[-4000:]}" for r, o in enumerate(outputs))
    assert not any(codes) and len(outputs) == world, f"exit codes {codes}\n{joined}"
    return outputs[0]


def launch_world(
    script: Path, world: int, arguments: Sequence[str] = (), timeout: float = 240, inside: Sequence[str] = ()
) -> tuple[list[int], list[str]]:
    """Run `script` as `world` ranks; returns every rank's exit code (negative: the signal) and output.

    When the deadline passes, all are killed, and the last output says so. `inside` is a command that each is run by.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        env = environment(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        command = [*inside, sys.executable, str(script), *arguments]
        children.append(
            subprocess.Popen(
                command,
                env=env,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )  # fmt: skip
        )
    outputs, until = [], time.monotonic() + timeout
    try:
        for child in children:
            outputs.append(child.communicate(timeout=max(1.0, until - time.monotonic()))[0])
    except subprocess.TimeoutExpired:
        outputs.append(f"no end after {timeout} s")
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    return [child.returncode for child in children], outputs
