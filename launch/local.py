"""Starting ranks on this machine, for `millrace pretrain` without a launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from millrace.core.console import error

GRACE_SECONDS = 60.0


def run_ranks(module: str, arguments: Sequence[str], processes: int) -> int:
    """Run `python -m MODULE ARGUMENTS` as `processes` ranks and wait.

    SIGTERM, SIGINT and SIGUSR1 are passed on and the ranks are left to save. When a rank fails the others are ended,
    since they would wait for it for ever. Returns 0, or the first non-zero exit code.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // processes))
    children = []
    for rank in range(processes):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": threads,
        }
        # A process group of their own: Ctrl-C reaches them once, through us.
        children.append(subprocess.Popen([sys.executable, "-m", module, *arguments], env=env, start_new_session=True))
    return _wait(children)


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    def forward(number: int, _frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children):
                _name_killed(children)
                _end(children)
                break
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _end(children)
    codes = [child.wait() for child in children]
    # A rank that was ended by us died of a signal (negative); the cause is the positive code, if there is one.
    bad = [c for c in codes if c]
    if not bad:
        return 0
    first = next((c for c in bad if c > 0), bad[0])
    return first if first > 0 else 128 - first


def _name_killed(children: list[subprocess.Popen[bytes]]) -> None:
    """Those that could not say themselves why they ended."""
    for rank, child in enumerate(children):
        code = child.poll()
        if code is not None and code < 0:
            error(f"rank {rank} (process {child.pid}) was ended by {signal.Signals(-code).name}")


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    """Let the ranks come to their own end for a moment (they may all be failing alike), then SIGTERM, then SIGKILL."""
    for seconds, number in ((3.0, signal.SIGTERM), (GRACE_SECONDS, signal.SIGKILL), (5.0, signal.SIGKILL)):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if all(child.poll() is not None for child in children):
                return
            time.sleep(0.05)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
