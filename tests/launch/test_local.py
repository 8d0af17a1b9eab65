"""Ranks on this machine: all end when one fails, signals are passed on, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

LAUNCH = "import sys; from millrace.launch import local; local.GRACE_SECONDS = 2.0; "
LAUNCH += "sys.exit(local.run_ranks('job', sys.argv[2:], int(sys.argv[1])))"


class Job:
    """A launcher in a process of its own, whose ranks run the module `job` in `folder`."""

    def __init__(self, folder: Path, body: str) -> None:
        self.folder = folder
        start = """
            import os, pathlib, signal, sys, time
            rank = int(os.environ["RANK"])
            pathlib.Path(f"pid-{rank}.tmp").write_text(str(os.getpid()))
        """
        # The file appears once the rank is ready: its handlers stand.
        ready = 'pathlib.Path(f"pid-{rank}.tmp").rename(f"pid-{rank}")\n'
        text = textwrap.dedent(start) + textwrap.dedent(body).replace("READY\n", ready)
        (folder / "job.py").write_text(text)

    def start(self, processes: int, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", LAUNCH, str(processes), *arguments]
        environment = os.environ | {"PYTHONPATH": str(self.folder)}
        environment.pop("OMP_NUM_THREADS", None)
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def pids(self, processes: int) -> list[int]:
        """Process ids of the ranks, once all are ready."""
        files = [self.folder / f"pid-{rank}" for rank in range(processes)]
        until = time.monotonic() + 30
        while not all(file.exists() for file in files):
            assert time.monotonic() < until, "the ranks did not start"
            time.sleep(0.02)
        return [int(file.read_text()) for file in files]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int]) -> bool:
    until = time.monotonic() + 5
    while time.monotonic() < until and any(alive(pid) for pid in pids):
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


def test_ranks_get_their_places_and_arguments(tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    job = Job(
        tmp_path,
        f"""
        seen = [os.environ[n] for n in {names}] + sys.argv[1:]
        pathlib.Path(f"out-{{rank}}").write_text("|".join(seen))
        READY
        """,
    )
    done = job.start(3, "run.toml", "a.b=c d")
    assert done.wait(30) == 0
    threads = str(max(1, len(os.sched_getaffinity(0)) // 3))
    for rank in range(3):
        expected = [str(rank), str(rank), "3", "3", "127.0.0.1", threads, "run.toml", "a.b=c d"]
        assert (tmp_path / f"out-{rank}").read_text().split("|") == expected


@pytest.mark.parametrize("code", [1, 75, 93])
def test_one_failing_rank_ends_the_others_and_its_code_is_passed_on(code: int, tmp_path: Path) -> None:
    job = Job(
        tmp_path,
        f"""
        READY
        if rank == 1:
            while not all(pathlib.Path(f"pid-{{r}}").exists() for r in (0, 2)):
                time.sleep(0.01)
            sys.exit({code})
        time.sleep(600)
        """,
    )
    started = job.start(3)
    pids = job.pids(3)
    assert started.wait(30) == code
    assert gone(pids)


def test_a_rank_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    job = Job(
        tmp_path,
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        READY
        while rank == 1 and not pathlib.Path("pid-0").exists():
            time.sleep(0.01)
        if rank == 1:
            sys.exit(3)
        time.sleep(600)
        """,
    )
    started = job.start(2)
    pids = job.pids(2)
    assert started.wait(30) == 3
    assert gone(pids)


def test_a_rank_killed_by_a_signal_gives_its_number(tmp_path: Path) -> None:
    job = Job(tmp_path, "READY\nif rank == 0:\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)\n")
    started = job.start(1)
    assert started.wait(30) == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_reaches_every_rank_once_and_they_may_finish(number: signal.Signals, tmp_path: Path) -> None:
    job = Job(
        tmp_path,
        """
        got = []
        for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(n, lambda n, _: got.append(signal.Signals(n).name))
        READY
        while not got:
            time.sleep(0.01)
        time.sleep(0.5)
        pathlib.Path(f"got-{rank}").write_text(" ".join(got))
        sys.exit(75)
        """,
    )
    started = job.start(2)
    pids = job.pids(2)
    started.send_signal(number)
    assert started.wait(30) == 75
    assert [(tmp_path / f"got-{rank}").read_text() for rank in (0, 1)] == [number.name] * 2
    assert gone(pids)
