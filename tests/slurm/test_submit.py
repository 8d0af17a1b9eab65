"""Submission, with stand-ins for sbatch (test_local_slurm.py submits to the real one)."""

from __future__ import annotations

from pathlib import Path

import pytest

from millrace.core.errors import UserError
from millrace.slurm.submit import submit

SCRIPT = "#!/usr/bin/env bash\n#SBATCH --nodes=1\necho ü\n"


def fake_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "sbatch").write_text(f"#!/bin/bash\n{body}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_dry_run_prints_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # needs no sbatch
    assert submit(SCRIPT, tmp_path / "run", dry_run=True) is None
    assert capsys.readouterr().out == SCRIPT
    assert list(tmp_path.iterdir()) == []


def test_scripts_are_kept_and_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sbatch(tmp_path / "bin", monkeypatch, 'echo "$@" >> "$(dirname "$0")/seen"; echo "4711;alpha"')
    run = tmp_path / "run"
    assert submit(SCRIPT, run) == "4711"
    assert submit(SCRIPT + "# again\n", run) == "4711"
    first, second = run / "slurm" / "job-1.sbatch", run / "slurm" / "job-2.sbatch"
    assert first.read_text() == SCRIPT
    assert second.read_text() == SCRIPT + "# again\n"
    assert (tmp_path / "bin" / "seen").read_text() == f"--parsable {first}\n--parsable {second}\n"


def test_no_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not on this machine's PATH.*--dry-run"):
        submit(SCRIPT, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_refusal_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sbatch(tmp_path / "bin", monkeypatch, "echo 'sbatch: error: Invalid account' >&2; exit 1")
    with pytest.raises(UserError, match=r"refused .*job-1.sbatch: sbatch: error: Invalid account; change"):
        submit(SCRIPT, tmp_path / "run")
    assert (tmp_path / "run" / "slurm" / "job-1.sbatch").read_text() == SCRIPT


def test_a_run_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sbatch(tmp_path / "bin", monkeypatch, "echo 1")
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="cannot write the batch script into .*run/slurm"):
        submit(SCRIPT, tmp_path / "run")
