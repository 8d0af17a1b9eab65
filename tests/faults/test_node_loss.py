"""A node that is lost in the middle of a job: the run goes on with the nodes that are left, after one submission."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from millrace.core.ledger import read
from millrace.engine.checkpoint.read import list_checkpoints, verdict
from millrace.eval.report.recovery import recoveries
from tests.faults.test_requeue import events, submit, wait_for_step
from tests.slurm import local_cluster
from tests.slurm.conftest import slurm_cluster  # noqa: F401
from tests.slurm.test_local_slurm import cluster, job_log, wait  # noqa: F401

EVERY = 5  # steps between checkpoints
ELASTIC = ("slurm.nodes=1", "slurm.max_nodes=2", "data.sequence_length=512")


@pytest.fixture
def lose(cluster: Path) -> Iterator[Any]:  # noqa: F811
    """Lose a node; it is there again afterwards."""
    directory, lost = Path(os.environ["SLURM_CONF"]).parent, []

    def action(node: str) -> None:
        lost.append(node)
        local_cluster.lose(directory, node)

    yield action
    for node in lost:
        local_cluster.revive(directory, node, os.getpid())


def of_job(run: Path) -> list[psutil.Process]:
    """Processes that still work for a run."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(run) in " ".join(p.info["cmdline"] or ())]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("node", ["n2", "n1"])  # rank 0 and the batch script are on n1
def test_the_run_goes_on_without_the_node(cluster: Path, config_file: Path, lose: Any, node: str) -> None:  # noqa: F811
    run = cluster
    job = submit(config_file, run, *ELASTIC)
    wait_for_step(run, 12, job)  # the first checkpoint is visible
    lose(node)
    assert wait(job, 600) == ("COMPLETED", 0), job_log(run, job)
    first, second = events(run, "start")
    assert (first["world"], second["world"]) == (2, 1), job_log(run, job)
    steps = [(record["step"], Counter(tuple(span) for span in record["samples"])) for record in events(run, "step")]
    assert {number for number, _ in steps} == set(range(1, 41))
    last = dict(steps)
    assert all(samples == last[number] for number, samples in steps), "a step that is done again has its samples"
    assert sum(Counter(span for spans in last.values() for span in spans).values()) == sum(map(len, last.values()))
    (found,) = recoveries(read(run / "ledger.jsonl"))
    print(f"lost {node}: {found.again} steps again, {found.seconds}")
    assert found.again < 2 * EVERY  # a save that was under way counts for nothing
    paths = list_checkpoints(run / "checkpoints")
    assert paths and not any(map(verdict, paths))
    assert not of_job(run)
