"""A node of a real Slurm that is bad before the start: it is named, and the run starts on the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.test_node_loss import ELASTIC
from tests.faults.test_requeue import events, submit
from tests.slurm.conftest import slurm_cluster  # noqa: F401
from tests.slurm.test_local_slurm import cluster, job_log, wait  # noqa: F401

NO_FOLDER = """
import os, tempfile
if os.environ.get("SLURMD_NODENAME") == "{node}":  # what the batch script exports reaches the tasks of all nodes
    tempfile.tempdir = "/nowhere"
"""


@pytest.fixture
def spoil(cluster: Path, tmp_path: Path) -> Iterator[Callable[[str, str], None]]:  # noqa: F811
    """Have every Python process of a task on a node run a program first; until the end of the test."""
    prologs: list[Path] = []

    def action(node: str, program: str) -> None:
        (tmp_path / node).mkdir()
        (tmp_path / node / "sitecustomize.py").write_text(program.format(node=node))
        prologs.append(Path(os.environ["SLURM_CONF"]).with_name(f"prolog-{node}"))
        prologs[-1].write_text(f"export PYTHONPATH={tmp_path / node}\n")

    yield action
    for prolog in prologs:
        prolog.unlink()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("node", ["n2", "n1"])  # the batch script runs on n1
def test_the_run_starts_without_a_bad_node(
    cluster: Path,  # noqa: F811
    config_file: Path,
    spoil: Callable[[str, str], None],
    node: str,
) -> None:
    spoil(node, NO_FOLDER)
    job = submit(config_file, cluster, *ELASTIC, "slurm.node_check=60")
    assert wait(job, 600) == ("COMPLETED", 0), job_log(cluster, job)
    (begun,) = events(cluster, "start")
    assert begun["world"] == 1, job_log(cluster, job)
    said = " ".join(job_log(cluster, job).split())
    assert f"node {node} is left out: /nowhere cannot be written" in said
    assert [record["step"] for record in events(cluster, "step")] == list(range(1, 41))
