"""`millrace fork`: a branch of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from millrace.core.errors import UserError
from millrace.core.rundir import RunDir
from millrace.engine.checkpoint.read import list_checkpoints, verdict
from millrace.launch.fork import main
from tests.handmade import small_model, write_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """With checkpoints of steps 1 and 2."""
    made = RunDir(tmp_path / "run")
    for step in (1, 2):
        write_checkpoint(made.checkpoints, small_model(), step=step)
    made.create({"seed": 7})
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("named, step", [("@1", 1), ("@2", 2), ("", 2)])
def test_a_branch_holds_one_checkpoint_and_its_lineage(run: RunDir, named: str, step: int) -> None:
    before = files(run.path)
    assert main([f"{run.path}{named}", "--name", "branch"]) == 0
    branch = RunDir(run.path.parent / "branch")
    (path,) = list_checkpoints(branch.checkpoints)
    assert path.name == f"step-{step:08d}" and not verdict(path)
    known = json.loads(run.identity.read_text())
    assert branch.parent == {"id": known["id"], "path": str(run.path), "step": step}
    assert branch.known() == {"seed": 7} and json.loads(branch.identity.read_text())["id"] != known["id"]
    assert branch.claim({"seed": 7}) == json.loads(branch.identity.read_text())["id"]
    assert files(run.path) == before and run.parent is None
    with pytest.raises(UserError, match=r"already holds another run \(seed: 7 there, 8 now\)"):
        branch.claim({"seed": 8})


def test_removing_the_source_leaves_the_branch(run: RunDir) -> None:
    import shutil

    main([f"{run.path}@1", "--name", "branch"])
    shutil.rmtree(run.path)
    (path,) = list_checkpoints(run.path.parent / "branch" / "checkpoints")
    assert not verdict(path)


@pytest.mark.parametrize(
    "source, name, says",
    [
        ("run@3", "b", "no checkpoint .*step-00000003"),
        ("run@x", "b", "the step after @ is a number"),
        ("nowhere", "b", "is not a run directory"),
        ("run@1", "run", "exists already"),
        ("run@1", "a/b", "give a plain folder name"),
    ],
)
def test_mistakes_leave_nothing(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, source: str, name: str, says: str
) -> None:
    monkeypatch.chdir(run.path.parent)
    with pytest.raises(UserError, match=says):
        main([source, "--name", name])
    assert [path.name for path in run.path.parent.iterdir()] == ["run"]


def test_a_damaged_checkpoint_is_refused(run: RunDir) -> None:
    path = next(run.checkpoints.glob("step-00000001/rank-*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="was altered"):
        main([f"{run.path}@1", "--name", "branch"])
    assert not (run.path.parent / "branch").exists()
