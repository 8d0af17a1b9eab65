"""Who is named for a hang, and the process beside a rank; whole runs that hang are in tests/faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from millrace.core.errors import UserError
from millrace.core.lease import acquire
from millrace.core.ledger import read as read_ledger
from millrace.core.rundir import RunDir
from millrace.core.units import Duration
from millrace.engine.watchdog.config import WatchdogConfig
from millrace.engine.watchdog.heartbeat import SECTIONS, Heartbeat, read
from millrace.engine.watchdog.verdict import Seen, judge
from tests.ranks import environment

REDUCING = """Thread 0x1 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait

Current thread 0x2 (most recent call first):
  File "/venv/torch/distributed/distributed_c10d.py", line 3001 in all_reduce
  File "/venv/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/home/me/millrace/engine/distributed.py", line 45 in sum
"""
READING = """Current thread 0x2 (most recent call first):
  File "/usr/lib/python3.11/queue.py", line 171 in get
  File "/home/me/millrace/data/prefetch.py", line 50 in __next__
"""
HOSTS = ["n1", "n1", "n2"]


def seen(rank: int, begun: int, **other: Any) -> Seen:
    known = {"section": "collective", "step": 7, "seconds": 12.0, "state": "S", "stack": REDUCING}
    return Seen(rank=rank, host=HOSTS[rank], begun=begun, **(known | other))


def test_the_one_who_is_behind_is_named_with_what_it_does() -> None:
    all_of_them = {0: seen(0, 20), 1: seen(1, 19, section="data", stack=READING), 2: seen(2, 20)}
    ranks, why = judge(HOSTS, all_of_them)
    assert ranks == [1]
    assert why == "rank 1 on n1 is in 'data' of step 7 for 12 s, in /usr/lib/python3.11/queue.py:171 in get"


def test_of_those_at_one_place_the_one_that_does_not_wait_is_named() -> None:
    busy = seen(2, 20, section="step", stack='Current thread 0x2:\n  File "/home/me/mine.py", line 3 in forward\n')
    assert judge(HOSTS, {0: seen(0, 20), 1: seen(1, 20), 2: busy}) == (
        [2], "rank 2 on n2 is in 'step' of step 7 for 12 s, in /home/me/mine.py:3 in forward",
    )  # fmt: skip


def test_who_left_out_a_collective_is_ahead_while_the_others_wait() -> None:
    ranks, why = judge(HOSTS, {0: seen(0, 20), 1: seen(1, 22, section="data", step=8), 2: seen(2, 20)})
    assert ranks == [1] and "rank 1 on n1 left out a collective and is in 'data' of step 8" in why


@pytest.mark.parametrize("state, words", [("T", "is stopped by a signal"), ("Z", "has ended"), ("", "has ended")])
def test_the_state_of_a_process_tells_before_its_place_does(state: str, words: str) -> None:
    ranks, why = judge(HOSTS, {0: seen(0, 20), 1: seen(1, 19, stack=READING), 2: seen(2, 20, state=state, stack="")})
    assert ranks == [2] and why.startswith(f"rank 2 on n2 {words}")


def test_a_node_that_does_not_answer_is_named() -> None:
    ranks, why = judge(HOSTS, {0: seen(0, 20), 1: seen(1, 20)})
    assert ranks == [2] and "rank 2 on n2 and the watcher beside it do not answer" in why


def test_nobody_is_blamed_where_all_wait_at_one_place() -> None:
    ranks, why = judge(HOSTS, {rank: seen(rank, 20) for rank in range(3)})
    assert ranks == [] and "all ranks wait for each other, in 'collective' of step 7" in why


def test_beats_are_read_as_they_were_written(tmp_path: Path) -> None:
    beat = Heartbeat(tmp_path / "beat")
    assert (read(tmp_path / "beat").section, read(tmp_path / "beat").begun) == ("start", 1)
    for number, section in enumerate(SECTIONS, 2):
        before = time.monotonic()
        beat.enter(section, number * 10**12)
        found = read(tmp_path / "beat")
        assert (found.section, found.step, found.begun) == (section, number * 10**12, number)
        assert before <= found.since <= time.monotonic()


def test_limits_are_times() -> None:
    assert set(WatchdogConfig().limits()) == set(SECTIONS)
    with pytest.raises(UserError, match="watchdog.step = '5 steps'"):
        WatchdogConfig(step=Duration(5, "steps"))


# A rank without torch: it says what it is at, then does what it is told.
RANK = """
import json, os, signal, sys, time
from pathlib import Path
from millrace.core.units import Duration
from millrace.engine.watchdog.config import WatchdogConfig
from millrace.engine.watchdog.watch import Watch

class World:
    rank = int(sys.argv[2])
    def gather_objects(self, item):
        return [f"node{rank}" for rank in range(2)]

def never_returns():
    time.sleep(600)

limit = Duration(2, "s")
with Watch(WatchdogConfig(data=limit, collective=Duration(600, "s")), Path(sys.argv[1]), World(), 1) as watch:
    print(watch._watcher.pid, watch._folder, flush=True)
    watch.enter("data", 5)
    what = sys.argv[3]
    if what == "waits":
        watch.enter("collective", 5)
        never_returns()
    if what == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "hangs":
        never_returns()
    if what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(12 if what == "beats" else 0):
        watch.enter("data", 5)
        time.sleep(0.25)
"""


def rank(run: Path, number: int, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RANK, str(run), str(number), what]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def gone(pid: int, seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while psutil.pid_exists(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not psutil.pid_exists(pid)


def finish(child: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and errors; its watcher and the watcher's folder must be gone."""
    try:
        out, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    watcher, folder = out.split()
    assert gone(int(watcher)) and not os.path.exists(folder), "the watcher left something behind"
    return child.returncode, errors


@pytest.mark.parametrize("what", ["hangs", "stops"])
def test_a_rank_that_hangs_is_named_and_all_are_ended(tmp_path: Path, what: str) -> None:
    run = RunDir(tmp_path)
    with acquire(tmp_path):
        children = [rank(tmp_path, 0, "waits"), rank(tmp_path, 1, what)]
        ends = [finish(child) for child in children]
    assert [code for code, _ in ends] == [-signal.SIGKILL, -signal.SIGKILL]
    said = " ".join(ends[0][1].split())
    named = "in 'data' of step 5" if what == "hangs" else "is stopped by a signal or a debugger, in 'data' of step 5"
    assert "the run hung: rank 1 on" in said and named in said and str(tmp_path / "hang/00000001") in said
    assert not ends[1][1]
    (record,) = read_ledger(run.ledger)
    assert (record["event"], record["ranks"], record["step"]) == ("hang", [1], 5) and record["why"] in said
    assert json.loads(run.outcome.read_text()) == {"code": 75, "why": record["why"], "step": 5}
    reports = [json.loads((tmp_path / f"hang/00000001/rank-0000{r}.json").read_text()) for r in (0, 1)]
    assert "in never_returns" in reports[0]["stack"]
    assert ("in never_returns" in reports[1]["stack"]) == (what == "hangs")


def test_a_rank_that_goes_on_is_left_alone_and_one_that_dies_leaves_no_watcher(tmp_path: Path) -> None:
    assert finish(rank(tmp_path, 0, "beats")) == (0, "")
    assert finish(rank(tmp_path, 0, "dies")) == (-signal.SIGKILL, "")
    assert not (tmp_path / "hang").exists()


def test_a_run_that_another_process_took_over_is_not_written(tmp_path: Path) -> None:
    acquire(tmp_path).release()
    with acquire(tmp_path):  # owner 2; the ranks belong to owner 1
        for child in [rank(tmp_path, 0, "hangs"), rank(tmp_path, 1, "hangs")]:
            assert finish(child)[0] == -signal.SIGKILL
    assert not RunDir(tmp_path).ledger.exists() and not RunDir(tmp_path).outcome.exists()
