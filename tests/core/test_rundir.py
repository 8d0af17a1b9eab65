"""A run directory belongs to one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.core.errors import UserError
from millrace.core.rundir import RunDir, write_atomic

FINGERPRINT = {"seed": 1, "batch": 32, "model": {"kind": "qwen3"}, "betas": (0.9, 0.95)}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_new_directory_is_made_and_the_same_run_continues(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "a")
    first = run.claim(FINGERPRINT)
    assert len(first) == 12 and run.checkpoints.is_dir()
    before = snapshot(run.path)
    assert RunDir(run.path).claim(dict(reversed(FINGERPRINT.items()))) == first
    assert snapshot(run.path) == before
    assert RunDir(tmp_path / "runs" / "b").claim(FINGERPRINT) != first


def test_another_run_is_refused_by_the_keys_that_differ_and_nothing_changes(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a")
    run.claim(FINGERPRINT)
    run.ledger.write_text('{"event": "start"}\n')
    (run.checkpoints / "step-00000001").mkdir()
    before = snapshot(run.path)
    with pytest.raises(UserError) as caught:
        run.claim(FINGERPRINT | {"seed": 2, "model": {"kind": "llama"}})
    assert str(caught.value) == (
        f"{run.path} already holds another run (model: {{'kind': 'qwen3'}} there, {{'kind': 'llama'}} now; "
        "seed: 1 there, 2 now); set run.name to a new name, or put these keys back to continue that run. "
        "Nothing was overwritten"
    )
    assert snapshot(run.path) == before


def test_a_key_that_is_gone_or_new_is_a_difference(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a")
    run.claim(FINGERPRINT)
    run.ledger.write_text('{"event": "start"}\n')
    with pytest.raises(UserError, match="extra: None there, 1 now"):
        run.claim(FINGERPRINT | {"extra": 1})
    with pytest.raises(UserError, match="seed: 1 there, None now"):
        run.claim({k: v for k, v in FINGERPRINT.items() if k != "seed"})


def test_a_run_that_never_started_does_not_bind(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a")
    first = run.claim(FINGERPRINT)
    assert run.claim(FINGERPRINT) == first
    other = run.claim(FINGERPRINT | {"seed": 2})
    assert other != first
    run.ledger.write_text('{"event": "start"}\n')
    assert run.claim(FINGERPRINT | {"seed": 2}) == other
    with pytest.raises(UserError, match="seed: 2 there, 1 now"):
        run.claim(FINGERPRINT)


def test_many_and_long_differences_are_cut(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a")
    run.claim(FINGERPRINT)
    run.ledger.write_text('{"event": "start"}\n')
    with pytest.raises(UserError) as caught:
        run.claim(FINGERPRINT | {f"k{i}": "x" * 100 for i in range(6)})
    assert "; and 2 more)" in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("left", ["ledger.jsonl", "checkpoints/step-00000001"])
def test_files_of_an_unknown_run_are_left_alone(left: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a")
    path = run.path / left
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(UserError, match=f"{run.path} holds files of an unknown run; set run.name to a new name"):
        run.claim(FINGERPRINT)
    assert path.read_text() == "precious" and not run.identity.exists()


def test_a_directory_that_holds_other_files_can_be_used(tmp_path: Path) -> None:
    """`millrace submit` writes its script before the run starts."""
    (tmp_path / "slurm").mkdir()
    assert RunDir(tmp_path).claim(FINGERPRINT)


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("precious")
    with pytest.raises(UserError, match=f"cannot write the run directory {tmp_path}/a: "):
        RunDir(tmp_path / "a").claim(FINGERPRINT)
    assert (tmp_path / "a").read_text() == "precious"


UNWRITABLE = """
import os, sys
os.setgid(65534); os.setuid(65534)
from millrace.core.rundir import RunDir
from millrace.core.errors import UserError
try:
    RunDir(sys.argv[1]).claim({})
except UserError as error:
    print(error)
"""


def test_a_directory_without_permission_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if os.geteuid() != 0:
        with pytest.raises(UserError, match="cannot write the run directory .*Permission denied"):
            RunDir(closed / "run").claim({})
        return
    # root may write everywhere, so another user tries; it must be able to reach the folder at all.
    for parent in (tmp_path, *tmp_path.parents):
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
        if parent.name.startswith("pytest-of-"):
            break
    script = "import millrace.core.rundir\n" + UNWRITABLE
    done = subprocess.run(
        [sys.executable, "-c", script, str(closed / "run")], capture_output=True, text=True, check=False
    )
    assert "cannot write the run directory" in done.stdout and "Permission denied" in done.stdout, done


def test_too_little_space_is_found_before_anything_is_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a")
    with pytest.raises(UserError, match="GB free and one checkpoint needs 1000000000.00 GB; free space or set run.dir"):
        run.claim(FINGERPRINT, min_free_bytes=10**18)
    assert not run.identity.exists()


def test_outcome(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_outcome(75, "asked to stop", 12)
    assert json.loads(run.outcome.read_text()) == {"code": 75, "why": "asked to stop", "step": 12}


def test_an_atomic_write_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, "old")
    write_atomic(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x.json"]

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "newer")
    assert path.read_text() == "new"
