"""Jobs on a real Slurm that are interrupted: one submission, and the run goes on to the same end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from millrace.core.ledger import read
from tests.ranks import environment
from tests.slurm.conftest import slurm_cluster  # noqa: F401
from tests.slurm.test_local_slurm import cluster, job_log, wait  # noqa: F401

OPTIONS = (
    "run.dir=.", "train.duration=40 steps", "checkpoint.every=5 steps", "engine.zero_stage=2",
    "run.sample_ids=true", "eval.every=1000 steps",
)  # fmt: skip
ASKED = ("slurm.nodes=2", "slurm.processes_per_node=1", "slurm.cpus_per_task=1", "slurm.time=10:00")


def events(run: Path, name: str) -> list[dict[str, Any]]:
    ledger = run / "ledger.jsonl"
    return [record for record in read(ledger) if record["event"] == name] if ledger.exists() else []


def submit(config: Path, run: Path, *more: str) -> str:
    command = [sys.executable, "-m", "millrace.launch", "submit", str(config), f"run.name={run.name}", *OPTIONS, *ASKED]
    done = subprocess.run([*command, *more], check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    return done.stdout.strip()


def wait_for_step(run: Path, step: int, job: str, starts: int = 1) -> None:
    until = time.monotonic() + 180
    while not (len(events(run, "start")) >= starts and (s := events(run, "step")) and s[-1]["step"] >= step):
        assert time.monotonic() < until, job_log(run, job)
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_submission_runs_to_the_end_across_interruptions(cluster: Path, config_file: Path) -> None:  # noqa: F811
    run, folder = cluster, cluster.parent
    slow = "data.sequence_length=512"  # a step takes long enough to be met in its middle
    job = submit(config_file, run, slow)
    wait_for_step(run, 7, job)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)  # what Slurm sends before the time limit
    assert wait(job, 420) == ("COMPLETED", 0), job_log(run, job)
    log = job_log(run, job)
    assert f"job {job} ended with 75 and is queued again" in log
    begun = events(run, "start")
    steps = [record["step"] for record in events(run, "step")]
    assert len(begun) == 2 and steps == list(range(1, 41)), "a stop that was asked for repeats no step"
    assert events(run, "end")[0]["outcome"] == 75 and begun[1]["resumed_from"] >= 7
    command = [sys.executable, "-m", "millrace.launch", "pretrain", str(config_file), "run.name=twin", slow, *OPTIONS]
    subprocess.run([*command, "run.processes=2"], check=True, cwd=folder, env=environment(), timeout=300)
    found, expected = ([(r["loss_hex"], r["samples"]) for r in events(r_, "step")] for r_ in (run, folder / "twin"))
    assert found == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_is_preempted_repeats_nothing(cluster: Path, config_file: Path) -> None:  # noqa: F811
    run = cluster
    job = submit(config_file, run, "data.sequence_length=512")
    wait_for_step(run, 7, job)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--cpus-per-task=2", "--output=/dev/null"]
    other = subprocess.run([*urgent, "--wrap=sleep 3"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    assert wait(other, 120) == ("COMPLETED", 0)
    assert wait(job, 420) == ("COMPLETED", 0), job_log(run, job)
    assert [record["step"] for record in events(run, "step")] == list(range(1, 41)), job_log(run, job)
    (first, last), (begun, again) = events(run, "end"), events(run, "start")
    assert (first["outcome"], last["outcome"]) == (75, 0) and "asked to stop by SIGTERM" in first["why"]
    assert begun["resumed_from"] is None and again["resumed_from"] == first["step"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_killed_in_a_job_is_started_again(cluster: Path, config_file: Path) -> None:  # noqa: F811
    import psutil

    run = cluster
    slow = "data.sequence_length=512"
    job = submit(config_file, run, slow)
    wait_for_step(run, 7, job)
    ranks = [p for p in psutil.process_iter(["cmdline", "environ"]) if (p.info["environ"] or {}).get("RANK") == "1"
             and (p.info["environ"] or {}).get("SLURM_JOB_ID") == job
             and "millrace.pretrain" in " ".join(p.info["cmdline"] or ())]  # fmt: skip
    assert ranks
    ranks[0].send_signal(signal.SIGKILL)
    assert wait(job, 420) == ("COMPLETED", 0), job_log(run, job)
    assert "is queued again" in job_log(run, job) and len(events(run, "start")) == 2
    assert {record["step"] for record in events(run, "step")} == set(range(1, 41))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_memory_limit_ends_the_job_with_93(cluster: Path, config_file: Path) -> None:  # noqa: F811
    """A model of 26 GB where a process may have 16 GiB of addresses."""
    run = cluster
    large = (
        "model.config.hidden_size=32768",
        "model.config.intermediate_size=65536",
        "slurm.setup=['ulimit -v 16777216']",
    )
    job = submit(config_file, run, *large)
    assert wait(job, 600) == ("FAILED", 93), job_log(run, job)
    log = " ".join(job_log(run, job).split())
    assert log.count("is out of memory: ") >= 3 and "lower train.micro_batch" in log and "rank 0 on " in log
    assert log.count("is queued again") == 2 and "3 starts on end made no checkpoint (newest: none)" in log


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_mistake_that_stays_ends_the_job_with_93(cluster: Path, config_file: Path) -> None:  # noqa: F811
    run = cluster
    job = submit(config_file, run, "data.manifest=/nowhere/at/all")
    assert wait(job, 420) == ("FAILED", 93), job_log(run, job)
    log = job_log(run, job)
    assert log.count("is queued again") == 2 and "3 starts on end made no checkpoint (newest: none)" in log
