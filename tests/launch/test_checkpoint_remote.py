"""`millrace checkpoint ls` and `download` of an object store, as a user sees them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from millrace.core import lease
from millrace.core.rundir import RunDir
from millrace.engine.checkpoint.read import verdict
from millrace.engine.checkpoint.upload import Uploader
from millrace.launch.cli import main
from tests.handmade import small_model, write_checkpoint

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store with steps 1 and 2 of the run 'tiny', and a part of step 3."""
    run = RunDir(tmp_path / "tiny")
    uploader = Uploader(f"file://{tmp_path}/store", run)
    run.path.mkdir()
    run.create({"seed": 3})
    for step in (1, 2):
        uploader.offer(write_checkpoint(run.checkpoints, small_model(), step=step))
        while uploader.steps:
            time.sleep(0.01)
    assert not any(told.why for told in uploader.told())
    (tmp_path / "store" / "step-00000003").mkdir()
    (tmp_path / "store" / "step-00000003" / "trainer.json").write_text("{}")
    return uploader.url


def shown(capsys: Capture) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_ls_names_them_newest_first(url: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "store" / "step-00000001" / "MANIFEST.json").write_text("{")
    assert main(["checkpoint", "ls", url]) == 0
    said = shown(capsys)
    assert "3 checkpoints" in said and said.index("step-00000003") < said.index("step-00000001")
    assert "not complete" in said and "2 × ZeRO 2" in said and "damaged: its manifest is none" in said


def test_the_newest_that_is_complete_or_the_one_that_is_named(url: str, tmp_path: Path, capsys: Capture) -> None:
    run = RunDir(tmp_path / "again")
    assert main(["checkpoint", "download", url, str(run.checkpoints)]) == 0
    assert main(["checkpoint", "download", f"{url}/step-00000001", str(run.checkpoints)]) == 0
    assert f"written: {run.checkpoints}/step-00000002" in shown(capsys)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000001", "step-00000002"]
    assert not any(map(verdict, run.checkpoints.iterdir()))
    assert run.claim({"seed": 3}) == json.loads((tmp_path / "tiny" / "run.json").read_text())["id"], "it goes on"


def test_into_a_folder_of_no_run(url: str, tmp_path: Path) -> None:
    assert main(["checkpoint", "download", url + "/", str(tmp_path / "here")]) == 0
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["step-00000002"]


def test_what_cannot_be_downloaded(url: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRES", 0.5)
    run = RunDir(tmp_path / "again")
    assert main(["checkpoint", "download", f"{url}/step-00000003", str(run.checkpoints)]) == 1
    assert "holds no complete checkpoint" in shown(capsys)
    assert main(["checkpoint", "download", "http://host/x", str(run.checkpoints)]) == 1
    assert "http://host/x is no folder of an object store" in shown(capsys)
    run.path.mkdir(exist_ok=True)
    run.create({"seed": 3})
    assert main(["checkpoint", "download", url, str(run.checkpoints)]) == 1
    assert "holds another run" in shown(capsys)
    with lease.acquire(tmp_path / "tiny"):
        assert main(["checkpoint", "download", url, str(tmp_path / "tiny" / "checkpoints")]) == 1
    assert "is being written by" in shown(capsys)
