"""The local cluster's own promise: it ends what it started, all of it and nothing else."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).with_name("local_cluster.py")


@pytest.fixture
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("local_cluster", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cluster_processes(directory: Path) -> set[str]:
    """Process ids whose environment or command line names `directory`."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(directory).encode() in text:
                found.add(entry.name)
    return found


def control(*arguments: object) -> None:
    subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], check=True, timeout=120)


@pytest.mark.timeout(900)
def test_a_start_ends_what_a_killed_session_left_and_nothing_else(
    slurm_cluster: dict[str, str], tmp_path: Path
) -> None:
    left, fresh = tmp_path / "left", tmp_path / "fresh"
    session = subprocess.Popen(["sleep", "600"])
    control("start", left, session.pid)
    try:
        # A job whose processes ignore SIGTERM, and one of which left the session of its parent.
        stubborn = f"trap '' TERM; touch {left}/running; setsid sleep 600 & while true; do sleep 0.2; done"
        (left / "job.sh").write_text(f"#!/bin/bash\n{stubborn}\n")
        environment = slurm_cluster | {"SLURM_CONF": f"{left}/slurm.conf"}
        subprocess.run(["sbatch", str(left / "job.sh")], check=True, env=environment, cwd=left)
        end = time.monotonic() + 90
        while not (left / "running").exists() and time.monotonic() < end:
            time.sleep(0.1)
        assert (left / "running").exists()
        assert len(cluster_processes(left)) >= 6  # four daemons, slurmstepd, the job
    finally:
        session.kill()
        session.wait()
    control("start", fresh)
    try:
        assert cluster_processes(left) == set()
        assert cluster_processes(fresh) != set()
    finally:
        control("stop", fresh)
    assert cluster_processes(fresh) == set()
    shown = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T"],
        env=slurm_cluster,
        capture_output=True,
        text=True,
    )
    assert shown.stdout.split("\n") == ["n1 idle", "n2 idle", ""]


def test_without_root_it_says_so(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert module.main(["start", str(tmp_path)]) == 77
    assert "needs root" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("apt", "reason"),
    [
        (None, "no munged, .*, and no apt-get to install"),
        (
            "echo 'E: Unable to locate package slurm-wlm' >&2; exit 100",
            "install .* failed: E: Unable to locate",
        ),
        ("exit 0", "are installed, yet munged, .* is missing"),
    ],
)
def test_packages_that_cannot_be_had_are_a_reason(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, apt: str | None, reason: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(module, "PATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    if apt is not None:
        (tmp_path / "apt-get").write_text(f"#!/bin/sh\n{apt}\n")
        (tmp_path / "apt-get").chmod(0o755)
    with pytest.raises(module.Unavailable, match=reason):
        module.install()
