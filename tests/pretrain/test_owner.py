"""Two processes and one run directory: never two writers."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

from millrace.core.ledger import read
from millrace.engine.checkpoint.read import Checkpoint, list_checkpoints
from tests.forkserver import Fork
from tests.pretrain.test_kill_resume import kill_tree
from tests.ranks import environment, start_python

Rank = Fork | subprocess.Popen[bytes]


def begin(config: Path, folder: Path, where: str) -> Rank:
    """A rank that writes `WHERE.log`."""
    arguments = [f"run.dir={folder}", "run.name=run", "train.duration=100k steps", "checkpoint.every=5 steps"]
    script = Path(__file__).with_name("owner_worker.py")
    with open(folder / f"{where}.log", "ab") as log:
        return start_python([str(script), where, str(config), *arguments], environment(), log.fileno(), log.fileno())


def steps(run: Path, owner: int) -> list[int]:
    ledger = run / "ledger.jsonl"
    found = read(ledger) if ledger.exists() else []
    return [r["step"] for r in found if r["event"] == "step" and r["owner"] == owner]


def wait_for_steps(run: Path, owner: int, count: int, child: Rank, log: Path) -> None:
    until = time.monotonic() + 120
    while len(steps(run, owner)) < count:
        assert child.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.05)


def test_a_second_start_is_refused_and_the_first_goes_on(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = begin(config_file, tmp_path, "here")
    try:
        wait_for_steps(run, 1, 2, first, tmp_path / "here.log")
        second = begin(config_file, tmp_path, "elsewhere")
        assert second.wait(120) == 1
        said = (tmp_path / "elsewhere.log").read_text()
        assert f"error: {run} is being written by process {first.pid} on " in said and "Traceback" not in said
        wait_for_steps(run, 1, len(steps(run, 1)) + 2, first, tmp_path / "here.log")
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 75
    finally:
        kill_tree(first.pid)
    done = steps(run, 1)
    assert done == list(range(1, len(done) + 1)) and not steps(run, 2)


def test_a_run_that_was_taken_over_writes_nothing_more(config_file: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "elsewhere.log"
    first = begin(config_file, tmp_path, "here")
    second = None
    try:
        wait_for_steps(run, 1, 7, first, tmp_path / "here.log")
        first.send_signal(signal.SIGSTOP)
        second = begin(config_file, tmp_path, "elsewhere")
        wait_for_steps(run, 2, 2, second, log)
        first.send_signal(signal.SIGCONT)
        assert first.wait(60) == 1
        said = (tmp_path / "here.log").read_text()
        assert f"error: {run} was taken over by another process" in said and "Traceback" not in said
        wait_for_steps(run, 2, len(steps(run, 2)) + 8, second, log)
        second.send_signal(signal.SIGTERM)
        assert second.wait(60) == 75
    finally:
        for child in (first, second):
            if child is not None:
                kill_tree(child.pid)
    owners = [record["owner"] for record in read(run / "ledger.jsonl")]
    assert owners == sorted(owners)
    done = steps(run, 2)
    assert done == list(range(done[0], done[0] + len(done))) and done[0] % 5 == 1  # from a checkpoint
    for path in list_checkpoints(run / "checkpoints"):
        assert not list(Checkpoint(path).problems())
    assert not list((run / "checkpoints").glob("*.tmp-*"))
