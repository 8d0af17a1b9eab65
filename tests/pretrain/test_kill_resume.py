"""Runs started as users start them, killed with SIGKILL and started again, against runs that were not."""

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

from millrace.engine.checkpoint.read import Checkpoint, list_checkpoints
from tests.ranks import ROOT, environment, run_world

WAYS = {
    "zero0": ["engine.zero_stage=0"],
    "zero1": ["engine.zero_stage=1"],
    "zero1-offload": ["engine.zero_stage=1", "engine.offload_optimizer=true"],
    "zero2": ["engine.zero_stage=2"],
    "zero2-offload": ["engine.zero_stage=2", "engine.offload_optimizer=true"],
    "zero3": ["engine.zero_stage=3"],
    "zero3-offload": ["engine.zero_stage=3", "engine.offload_optimizer=true"],
    "zero3-thr0": ["engine.zero_stage=3", "engine.persistence_threshold=0"],
    "zero3-thr0-offload": [
        "engine.zero_stage=3", "engine.persistence_threshold=0", "engine.offload_optimizer=true",
    ],
}  # fmt: skip
QUICK = ("zero3",)
STEPS = 14


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=open(log, "ab"), stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(command: list[str], log: Path, timeout: float = 120) -> int:
    child = start(command, log)
    try:
        return child.wait(timeout)
    finally:
        kill_tree(child.pid)


def kill_tree(pid: int) -> None:
    """SIGKILL the ranks before their parent, so that none gets to save."""
    try:
        parent = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    for process in [*parent.children(recursive=True), parent]:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def records(run: Path, event: str = "step") -> dict[int, Any]:
    from millrace.core.ledger import read

    found = [r for r in read(run / "ledger.jsonl") if r["event"] == event] if (run / "ledger.jsonl").exists() else []
    return {r["step"]: r for r in found}


def command(config: Path, folder: Path, name: str, overrides: list[str]) -> list[str]:
    return [
        sys.executable, "-m", "millrace.launch", "pretrain", str(config), f"run.dir={folder}", f"run.name={name}",
        "run.processes=2", "run.sample_ids=true", f"train.duration={STEPS} steps", "checkpoint.every=3 steps",
        "eval.every=5 steps", *overrides,
    ]  # fmt: skip


@pytest.mark.parametrize("way", [pytest.param(w, marks=() if w in QUICK else pytest.mark.slow) for w in WAYS])
def test_killed_and_resumed_equals_its_twin(config_file: Path, tmp_path: Path, way: str) -> None:
    log = tmp_path / "log"
    run_world("millrace.pretrain", 2, command(config_file, tmp_path, "twin", WAYS[way])[4:])
    cut = command(config_file, tmp_path, "cut", WAYS[way])
    child = start(cut, log)
    until = time.monotonic() + 120
    while len(records(tmp_path / "cut")) < 5:
        assert child.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.02)
    kill_tree(child.pid)
    child.wait()
    assert max(records(tmp_path / "cut")) < STEPS
    assert finish(cut, log) == 0, log.read_text()[-3000:]
    a, b = records(tmp_path / "twin"), records(tmp_path / "cut")
    assert sorted(b) == list(range(1, STEPS + 1))
    assert [r["samples"] for r in b.values()] == [r["samples"] for r in a.values()]
    assert [b[s]["loss_hex"] for s in sorted(b)] == [a[s]["loss_hex"] for s in sorted(a)]
    ends = [Checkpoint(list_checkpoints(tmp_path / n / "checkpoints")[0]) for n in ("twin", "cut")]
    assert ends[0].step == ends[1].step == STEPS
    assert ends[0].digest() == ends[1].digest()


def test_sigterm_saves_and_says_continue(config_file: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = command(config_file, tmp_path, "run", ["train.duration=100k steps", "checkpoint.every=100k steps"])
    child = start(run, log)
    until = time.monotonic() + 120
    while len(records(tmp_path / "run")) < 3:
        assert child.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.05)
    children = psutil.Process(child.pid).children(recursive=True)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(60) == 75, log.read_text()[-3000:]
    assert not psutil.wait_procs(children, timeout=10)[1], "ranks were left behind"
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["code"] == 75 and "SIGTERM" in outcome["why"]
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[0].name == f"step-{outcome['step']:08d}"


LAUNCHERS = {
    "bare": ["-m", "millrace.pretrain"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "millrace.pretrain"],
    "accelerate": [
        "-m", "accelerate.commands.launch", "--config_file", "{accelerate}", "-m", "millrace.pretrain",
    ],
}  # fmt: skip

ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  zero_stage: 1
machine_rank: 0
num_machines: 1
num_processes: 2
use_cpu: true
main_process_port: 0
"""


@pytest.fixture(scope="module")
def launched(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, Any]]:
    """The same run from every launcher."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "accelerate.yaml").write_text(ACCELERATE)
    ledgers = {}
    for name, how in LAUNCHERS.items():
        start_with = [h.format(accelerate=folder / "accelerate.yaml") for h in how]
        arguments = command(config_file, folder, name, [])[4:]
        log = folder / f"{name}.log"
        assert finish([sys.executable, *start_with, *arguments], log) == 0, log.read_text()[-3000:]
        ledgers[name] = records(folder / name) | {0: records_start(folder / name)}
    return ledgers


def records_start(run: Path) -> Any:
    from millrace.core.ledger import read

    return next(r for r in read(run / "ledger.jsonl") if r["event"] == "start")


def test_every_launcher_starts_the_same_run(launched: dict[str, dict[int, Any]]) -> None:
    assert [launched[n][0]["world"] for n in LAUNCHERS] == [1, 2, 2]
    assert [launched[n][0]["zero_stage"] for n in LAUNCHERS] == [2, 2, 1], "the Accelerate file's stage is honoured"
    reference = launched["bare"]
    for name in LAUNCHERS:
        for step in range(1, STEPS + 1):
            assert launched[name][step]["samples"] == reference[step]["samples"]
            assert launched[name][step]["loss"] == pytest.approx(reference[step]["loss"], rel=1e-5)
