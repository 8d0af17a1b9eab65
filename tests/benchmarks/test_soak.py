"""The parts of benchmarks/soak.py that decide what is done and what is counted; no training."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.house.typing_tree import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other as siblings

from faulty import account, damage, orders
from faulty.arms import Arm
from faulty.job import Job
from faulty.plan import KINDS, Fault, draw
from faulty.supervise import FAILURES, History, Soak, Start, Tail


def take(count: int, seed: int = 0) -> list[Fault]:
    return list(itertools.islice(draw(seed, (30.0, 60.0), 2), count))


class TestPlan:
    def test_a_seed_draws_one_order_with_every_kind_in_each_eight(self) -> None:
        faults = take(24)
        assert faults == take(24) != take(24, seed=1)
        for first in (0, 8, 16):
            assert {fault.kind for fault in faults[first : first + 8]} == set(KINDS)
        assert all(30 <= f.after <= 60 and f.rank in (0, 1) and 0 <= f.at < 1 and 0 <= f.bit < 8 for f in faults)
        assert len({fault.rank for fault in faults}) == 2 and [f.number for f in faults] == list(range(24))


class TestDamage:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        for name in ("step-00000020", "checkpoint-3", "step-00000040.tmp-1"):
            (tmp_path / name).mkdir()
        found = damage.newest(tmp_path)
        assert found == tmp_path / "step-00000020" and damage.number(found) == 20 and damage.count(tmp_path) == 2
        (found / "a").write_bytes(bytes(30))
        (found / "b").mkdir()
        (found / "b" / "c").write_bytes(bytes(70))
        return found

    def test_every_byte_has_its_place(self, checkpoint: Path) -> None:
        places = [damage.place(checkpoint, n / 100) for n in range(100)]
        assert places[0] == (checkpoint / "a", 0) and places[99] == (checkpoint / "b" / "c", 69)
        assert len(set(places)) >= 98  # but for rounding

    def test_torn_and_flipped(self, checkpoint: Path) -> None:
        before = damage.identity(checkpoint)
        assert damage.tear(checkpoint, 0.5) == "b/c cut off at byte 20"
        assert [(checkpoint / name).stat().st_size for name in ("a", "b/c")] == [30, 20]
        assert damage.flip(checkpoint, 0.2, 3) == "bit 3 of byte 10 of a"
        assert (checkpoint / "a").read_bytes() == bytes(10) + b"\x08" + bytes(19)
        assert damage.identity(checkpoint) == before
        damage.remove(checkpoint)
        checkpoint.mkdir()
        assert damage.identity(checkpoint) != before


def step(number: int, time: float, *, start: int = 0, loss: float = 1.0, samples: list[Any] | None = None) -> Any:
    samples = [number] if samples is None else samples
    return {"event": "step", "start": start, "step": number, "time": time, "seconds": 0.5, "loss": loss,
            "samples": samples}  # fmt: skip


def begin(time: float, resumed: int) -> dict[str, Any]:
    return {"event": "start", "start": 0, "time": time, "resumed_from": resumed}


class TestAccount:
    def test_figures_of_a_run_that_was_killed_and_continued(self) -> None:
        records = [begin(0, 0), *(step(n, n) for n in (1, 2, 3, 4)), begin(5, 2), step(3, 6), step(4, 7, loss=math.nan)]
        records += [{"event": "skip", "step": 4, "time": 7}, step(5, 8), step(6, 99)]
        starts = [Start(0, 0.0, None, False), Start(1, 5.0, 2, True, resumed=2, first=6.0)]
        faults = [{"kind": "torn", "time": 4.0, "recovered": 6.0}, {"kind": "nan", "time": 7.0}]
        history = History(starts=starts, faults=faults, seconds=10.0, until=10.0)
        found = account.figures(records, history, [[n] for n in range(1, 9)])
        assert found["steps"] == 5 and found["recomputed_steps"] == 2 and found["steps_not_taken"] == 1
        assert found["goodput"] == pytest.approx(0.2) and found["seconds_lost_per_fault"] == pytest.approx(4.0)
        assert found["recovery_seconds"] == {"torn": 2.0}
        assert (found["samples_lost"], found["samples_repeated"], found["samples_computed_again"]) == (0, 0, 2)
        assert found["damaged_loaded"] == 1 and found["restarts_from_zero"] == 0 and found["steps_poisoned"] == 0

    def test_a_silent_restart_from_zero_is_one_only_where_there_was_a_checkpoint(self) -> None:
        starts = [Start(0, 0.0, None, False, resumed=0), Start(1, 1.0, None, False, resumed=0)]
        starts.append(Start(2, 2.0, 20, False, resumed=0))
        found = account.figures([begin(0, 0)], History(starts=starts, seconds=3.0, until=3.0), [])
        assert found["restarts_from_zero"] == 1 and found["restarts"] == 2

    def test_samples_that_are_lost_and_repeated(self) -> None:
        reference = [[[1, 0, 5], [2, 0, 5]], [[3, 0, 5], [4, 0, 5]]]
        steps = [step(1, 1, samples=[[1, 0, 5], [2, 0, 5]]), step(2, 2, samples=[[2, 0, 5], [4, 0, 5]])]
        made = [[tuple(sample) for sample in part] for part in reference]
        assert account.streams(steps, made) == (1, 1) and account.streams(steps[:1], made) == (0, 0)

    def test_ranks_are_merged_and_a_step_that_one_of_them_did_not_finish_is_left_out(self) -> None:
        first = [begin(0, 0), step(1, 1, samples=[1]), step(2, 2, samples=[3]), step(3, 3, samples=[5])]
        second = [begin(0, 0), step(1, 1, samples=[2]), step(2, 2, samples=[4], loss=math.nan)]
        merged = account.merge([first, second])
        assert [r.get("samples") for r in merged] == [None, [1, 2], [3, 4]] and math.isnan(merged[2]["loss"])

    def test_a_nan_that_stays_is_poison(self) -> None:
        nan = math.nan
        assert account.poisoned([step(n, n, loss=loss) for n, loss in enumerate([1, nan, 1, nan, nan, nan])]) == 2


def test_an_order_is_taken_once_by_its_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"RANK": "1", "SOAK_START": "3", "SOAK_FOLDER": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    mine = orders.Orders()
    assert (tmp_path / "rank-1.pid").read_text() == str(os.getpid()) and not mine.take("nan")
    other, taken = orders.give(tmp_path, 0, "nan"), orders.give(tmp_path, 1, "nan")
    assert not mine.take("kill in save") and mine.take("nan") and not mine.take("nan")
    assert taken.exists() and not other.exists()


def test_a_tail_waits_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"event": "a"}\n{"eve')
    assert [r["event"] for r in tail.read()] == ["a"]
    with open(path, "a") as file:
        file.write('nt": "b"}\n')
    assert [r["event"] for r in tail.read()] == ["b"] and tail.read() == []


ESCAPES = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
"""


def test_what_leaves_its_parent_is_found_counted_and_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faulty.job._ENDS", 0.3)
    with Job([sys.executable, "-c", ESCAPES], os.environ, tmp_path / "log") as job:
        assert job.launcher.wait(30) == 0 and len(job.processes()) == 1
        assert job.orphans() == 1 and job.processes() == []
    with Job([sys.executable, "-c", "import time; time.sleep(600)"], os.environ, tmp_path / "log") as job:
        pass
    assert job.launcher.returncode == -signal.SIGKILL and not job.processes()


# A job that resumes from its newest checkpoint, saves every tenth step, and cannot start from a torn one.
TOY = """
import json, os, pathlib, sys, time
run = pathlib.Path(sys.argv[1])
run.mkdir(exist_ok=True)
log = open(run / "log.jsonl", "a", buffering=1)
def write(**record): log.write(json.dumps(record | {"time": time.time()}) + "\\n")
(run.parent / "rank-0.pid").write_text(str(os.getpid()))
saved = sorted(run.glob("step-*"), key=lambda p: int(p.name[5:]))
step = int((saved[-1] / "a").read_text()) if saved else 0  # a torn one is empty
write(event="start", resumed_from=step)
while True:
    time.sleep(0.02)
    step += 1
    write(event="step", step=step, seconds=0.02, loss=1.0, samples=[step])
    if step % 10 == 0:
        (run / f"step-{step:08d}").mkdir(exist_ok=True)
        (run / f"step-{step:08d}" / "a").write_text(str(step))
"""


class Toy(Arm):
    def command(self) -> list[str]:
        return [sys.executable, "-c", TOY, str(self.ledger.parent)]


def fault(number: int, kind: str) -> Fault:
    return Fault(number=number, after=1.0, kind=kind, rank=0, at=0.0, bit=0)


def test_a_toy_is_started_again_and_freed_by_hand(tmp_path: Path) -> None:
    """Killed, torn, then hanging: restarts, one intervention after three failures, one hang that the deadline ends."""
    folder = tmp_path / "toy"
    arm = Toy("toy", "", [], folder, folder / "run" / "log.jsonl", folder / "run", grace=1.0)
    kinds = ["kill rank", "torn", "stop"]
    faults = itertools.chain(
        (fault(n, kind) for n, kind in enumerate(kinds)), (fault(9, "nan") for _ in itertools.count())
    )
    began = time.monotonic()
    history = Soak(arm, faults, seconds=9.0, deadline=1.5).run()
    assert time.monotonic() - began < 30
    assert [f["kind"] for f in history.faults][:3] == kinds and all("recovered" in f for f in history.faults[:3])
    assert len(history.interventions) == 1 and sum(s.first is None for s in history.starts) == FAILURES
    assert sum(s.hung for s in history.starts) == 1 and sum(s.orphans for s in history.starts) == 0
    records = [json.loads(line) for line in arm.ledger.read_text().splitlines()]
    found = account.figures(records, history, [[n] for n in range(1, 2000)])
    assert found["samples_lost"] == found["samples_repeated"] == 0 < found["recomputed_steps"]
    assert found["damaged_loaded"] == 0 and found["restarts_from_zero"] == 0 and not history.over
