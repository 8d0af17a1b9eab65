"""The local two-node Slurm, once per test session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("local_cluster.py")
UNAVAILABLE = 77


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment (SLURM_CONF, PATH) of a running cluster of nodes n1 and n2; skips where none can be.

    Another process starts it, so that this one keeps no daemons as children. It is told this one's id: the
    next start ends what a killed test session left behind. With MILLRACE_REQUIRE_SLURM=1 (CI) nothing is skipped.
    """
    directory = tmp_path_factory.mktemp("slurm")
    command = [sys.executable, str(SCRIPT), "start", str(directory), str(os.getpid())]
    try:
        started = subprocess.run(command, capture_output=True, text=True, timeout=700)
        required = os.environ.get("MILLRACE_REQUIRE_SLURM", "0") not in ("", "0")
        if started.returncode == UNAVAILABLE and not required:
            pytest.skip(f"no local Slurm: {started.stderr.strip()}")
        assert started.returncode == 0, started.stderr
        conf = started.stdout.strip().removeprefix("export SLURM_CONF=")
        path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        yield outer | {"SLURM_CONF": conf, "PATH": path}
    finally:
        subprocess.run([sys.executable, str(SCRIPT), "stop", str(directory)], timeout=60, check=True)
