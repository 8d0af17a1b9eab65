"""Jobs on a real Slurm of two nodes (see local_cluster.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from millrace.core.errors import UserError
from millrace.core.ledger import read
from millrace.data.prepare import PrepareConfig, prepare
from millrace.slurm.config import SlurmConfig
from millrace.slurm.render import render
from millrace.slurm.submit import submit

REPORT = """
    import json, os, sys
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    seen = {
        "rank": dist.get_rank(), "world": dist.get_world_size(), "sum": total.item(),
        "node": os.environ["SLURMD_NODENAME"], "arguments": sys.argv[2:],
        "threads": os.environ["OMP_NUM_THREADS"], "setup": os.environ.get("FROM_SETUP"),
        "table": os.environ.get("FROM_TABLE"),
    }
    with open(os.path.join(sys.argv[1], f"rank-{dist.get_rank()}.json"), "w") as file:
        json.dump(seen, file)
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.fixture
def cluster(slurm_cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """This process talks to the local Slurm; returns a run directory whose name needs quoting."""
    for name in set(os.environ) - set(slurm_cluster):
        monkeypatch.delenv(name)
    for name, value in slurm_cluster.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run 1%j of 'it'"
    run.mkdir()
    monkeypatch.chdir(tmp_path)
    return run


def wait(job: str, seconds: float = 240) -> tuple[str, int]:
    """(state, exit code) of the job once it has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True)
        fields = dict(pair.split("=", 1) for pair in shown.stdout.split() if "=" in pair)
        state = fields.get("JobState", "")
        if state and state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            return state, int(fields["ExitCode"].partition(":")[0])
        time.sleep(0.2)
    raise AssertionError(f"job {job} did not end within {seconds} s: {shown.stdout}")


def job_log(run: Path, job: str) -> str:
    path = run / "slurm" / f"{job}.out"
    return path.read_text() if path.exists() else f"no {path}"


@pytest.mark.timeout(900)  # the first start may install Debian's packages
def test_two_nodes_meet_through_the_rendered_rendezvous(cluster: Path) -> None:
    run = cluster
    (run.parent / "report.py").write_text(textwrap.dedent(REPORT))
    odd = ["a b", "$HOME", "it's", "*", "", 'q"q', "back\\slash", "#no", "`id`", "é\n2"]
    config = SlurmConfig(
        nodes=2,
        processes_per_node=1,
        cpus_per_task=2,
        time="5",
        environment={"FROM_TABLE": "x $y 'z'"},
        setup=["export FROM_SETUP=$((20 + 3))"],
        extra=["--comment=two words"],
    )
    job = submit(render(config, ["report.py", str(run), *odd], run), run)
    assert job is not None
    assert wait(job) == ("COMPLETED", 0), job_log(run, job)
    seen = [json.loads((run / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [(each["rank"], each["world"], each["sum"]) for each in seen] == [(0, 2, 3.0), (1, 2, 3.0)]
    assert [each["node"] for each in seen] == ["n1", "n2"]
    for each in seen:
        assert each["arguments"] == odd
        assert (each["threads"], each["setup"], each["table"]) == ("2", "23", "x $y 'z'")
    assert (run / "slurm" / "job-1.sbatch").exists()
    assert f"job {job} on n1 n2" in job_log(run, job)


@pytest.mark.parametrize(
    ("outcome", "own", "expected"),
    [
        ('{"code": 0, "why": "done", "step": 3}', 1, 0),
        ('{"code": 75, "why": "asked to", "step": 3}', 0, 75),
        ('{"code": 93, "why": "loss is not finite", "step": 3}', 1, 93),
        ('{"code": 12, "why": "not one of ours", "step": 3}', 7, 7),
        (None, 7, 7),
    ],
)
def test_the_job_ends_with_the_runs_outcome(cluster: Path, outcome: str | None, own: int, expected: int) -> None:
    """The launcher is replaced by a script that ends with `own`; a stale outcome.json says 75."""
    run = cluster
    (run / "outcome.json").write_text('{"code": 75, "why": "of an earlier job", "step": 1}')
    write = "" if outcome is None else f"printf '%s' '{outcome}' > \"$1/outcome.json\"; "
    fake = run.parent / "python"
    first = '[[ $SLURM_NODEID == 0 ]] || exit 0\nset -- "${@: -1}"\n'
    fake.write_text(f"#!/bin/bash\n{first}{write}sleep 1; exit {own}\n")
    fake.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.executable", str(fake))
        config = SlurmConfig(nodes=2, time="5", requeue=False, node_check=0)
        script = render(config, ["-m", "x", str(run)], run)
    job = submit(script, run)
    assert job is not None
    state, code = wait(job, 60)
    assert (state, code) == ("COMPLETED" if expected == 0 else "FAILED", expected), job_log(run, job)


def test_what_slurm_refuses_is_passed_on(cluster: Path) -> None:
    script = render(SlurmConfig(partition="nowhere"), ["x.py"], cluster)
    with pytest.raises(UserError, match=r"(?s)job-1.sbatch.*invalid partition.*\[slurm\]"):
        submit(script, cluster)


RECIPE = """
    [run]
    dir = "."
    sample_ids = true
    [data]
    manifest = "corpus"
    sequence_length = 64
    [model]
    depth = 2
    config = {hidden_size = 32, intermediate_size = 64, num_attention_heads = 2, num_key_value_heads = 1}
    [train]
    duration = "6 steps"
    batch = 4
    micro_batch = 1
    [engine]
    zero_stage = 2
    precision = "fp32"
    [checkpoint]
    every = "3 steps"
"""


def steps(run: Path) -> list[tuple[int, str, list[list[int]]]]:
    events = read(run / "ledger.jsonl")
    return [(e["step"], e["loss_hex"], e["samples"]) for e in events if e["event"] == "step"]


@pytest.mark.timeout(900)
def test_sbatch_and_srun_on_two_nodes_equal_two_ranks_on_one_machine(cluster: Path) -> None:
    """A real pretraining through sbatch: same samples and, to the last bit, same losses as without it."""
    run, folder = cluster, cluster.parent
    (folder / "text").mkdir()
    for number in range(40):
        words = " ".join(f"word{(number * k) % 17}" for k in range(20 + number))
        (folder / "text" / f"{number:02}.txt").write_text(words)
    prepare(PrepareConfig(inputs=["text"], out="corpus", vocab_size=300))
    (folder / "recipe.toml").write_text(textwrap.dedent(RECIPE))
    python = [sys.executable, "-m"]
    asked = ["slurm.nodes=2", "slurm.processes_per_node=1", "slurm.cpus_per_task=1", "slurm.time=10:00"]
    command = [*python, "millrace.launch", "submit", "recipe.toml", f"run.name={run.name}", *asked]
    job = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout.strip()
    assert wait(job) == ("COMPLETED", 0), job_log(run, job)
    assert json.loads((run / "outcome.json").read_text())["code"] == 0
    began = next(e for e in read(run / "ledger.jsonl") if e["event"] == "start")
    assert (began["world"], began["zero_stage"]) == (2, 2)
    assert (run / "checkpoints" / "step-00000006" / "MANIFEST.json").exists()
    assert [number for number, _, _ in steps(run)] == [1, 2, 3, 4, 5, 6]
    starts = {
        "srun": ["srun", "-N2", "--ntasks-per-node=1", *python, "millrace.pretrain", "recipe.toml"],
        "here": [*python, "millrace.launch", "pretrain", "recipe.toml", "run.processes=2"],
    }
    for name, start in starts.items():
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*start, f"run.name={name}"], check=True, env=environment, timeout=300)
        assert steps(folder / name) == steps(run), name
