"""Running a script as several ranks, with a deadline, leaving no process behind."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.forkserver import Fork, Server

ROOT = Path(__file__).resolve().parents[1]
# The hashes of strings differ from one server to the other: neighbours among ranks, and starts in turn, have others.
SERVERS: list[Server] = []
TURNS = itertools.count()


def environment(**extra: str) -> dict[str, str]:
    """This environment for child processes: one thread a rank, none that compiles, no variable of a launcher."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID")
    kept = {k: v for k, v in os.environ.items() if k not in drop and not k.startswith("ACCELERATE_")}
    ours = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return kept | ours | extra


def start_python(
    arguments: Sequence[str], env: dict[str, str], out: int, err: int, turn: int | None = None
) -> Fork | subprocess.Popen[bytes]:
    """`python ARGUMENTS` in a session of its own, from ROOT: forked, with torch imported; `turn` chooses by whom."""
    if sys.platform != "linux" or Path("/dev/nvidiactl").exists():  # CUDA does not survive a fork
        return start([sys.executable, *arguments], env, out, err)
    while len(SERVERS) < 2:
        SERVERS.append(Server(environment(DS_ACCELERATOR="cpu")))
    return SERVERS[(next(TURNS) if turn is None else turn) % 2].start(arguments, env, out, err)


def start(command: Sequence[str], env: dict[str, str], out: int, err: int) -> subprocess.Popen[bytes]:
    """A command in a session of its own, from ROOT."""
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=out, stderr=err, start_new_session=True)


def run_world(script: Path | str, world: int, arguments: Sequence[str] = (), timeout: float = 240) -> str:
    """Run `script` as `world` ranks; returns rank 0's stdout.

    Raises:
        AssertionError: a rank failed, or the deadline passed; the message holds every rank's output.
    """
    codes, outputs = launch_world(script, world, arguments, timeout)
    joined = "\n".join(f"--- rank {r}\n{o[-4000:]}" for r, o in enumerate(outputs))
    assert not any(codes) and len(outputs) == world, f"exit codes {codes}\n{joined}"
    return outputs[0]


class Output(threading.Thread):
    """What is written into a pipe, until the last that has its end `write` is gone."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._read, self.write = os.pipe()
        self.text = ""
        self.start()

    def run(self) -> None:
        with open(self._read, errors="replace") as pipe:
            for line in pipe:
                self.text += line


def launch_world(
    script: Path | str, world: int, arguments: Sequence[str] = (), timeout: float = 240, inside: Sequence[str] = ()
) -> tuple[list[int], list[str]]:
    """Run `script`, or the module of this name, as so many ranks; returns each one's exit code and output.

    A negative code is the signal that ended it. When the deadline passes, all are killed, and a last output says so.
    `inside` is a command that each is run by.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children: list[Fork | subprocess.Popen[bytes]] = []
    outputs = [Output() for _ in range(world)]
    what = [*(["-m", script] if isinstance(script, str) else [str(script)]), *arguments]
    more, until, turn = [], time.monotonic() + timeout, next(TURNS)
    try:
        for rank, output in enumerate(outputs):
            env = environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            try:
                children.append(
                    start([*inside, sys.executable, *what], env, output.write, output.write)
                    if inside
                    else start_python(what, env, output.write, output.write, turn + rank)
                )
            finally:
                os.close(output.write)
        for child, output in zip(children, outputs, strict=True):
            child.wait(max(1.0, until - time.monotonic()))
            output.join(max(1.0, until - time.monotonic()))  # what a rank leaves behind may still say why it ended
    except subprocess.TimeoutExpired:
        more = [f"no end after {timeout} s"]
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        for output in outputs:
            output.join(5)
    return [child.returncode or 0 for child in children], [output.text for output in outputs] + more


def run_alone(module: str, arguments: Sequence[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS`; its exit code, output and errors.

    Raises:
        subprocess.TimeoutExpired: it was killed at its deadline.
    """
    out, err = Output(), Output()
    child = start_python(["-m", module, *arguments], environment(), out.write, err.write)
    os.close(out.write)
    os.close(err.write)
    try:
        child.wait(timeout)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        for output in (out, err):
            output.join(10)
    return subprocess.CompletedProcess([module, *arguments], child.wait(), out.text, err.text)
