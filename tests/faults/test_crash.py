"""A crash at every write, fsync, rename and removal of a save: the run goes on from the last good checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from millrace.engine.checkpoint import write as writing
from millrace.engine.checkpoint.read import list_checkpoints, open_newest, remove_leftovers, verdict
from millrace.engine.checkpoint.retention import prune
from millrace.engine.checkpoint.write import step_name
from millrace.engine.config import CheckpointConfig
from tests.faults.crash import KINDS, Disk, restore, watched
from tests.faults.saves import save
from tests.ranks import ROOT, environment


def after_crash(disk: Disk, kind: str, scratch: Path) -> int:
    """The step that a run goes on from; every visible checkpoint must verify."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    restore(disk.tree(kind), scratch)
    remove_leftovers(scratch)
    for path in list_checkpoints(scratch):
        assert not verdict(path), f"moment {disk.moments}, {kind}: {path.name}: {verdict(path)}"
    found, rejected = open_newest(scratch)
    assert found is not None and not rejected, f"moment {disk.moments}, {kind}"
    return found.step


def sweep(folder: Path, action: Callable[[], None], scratch: Path, after: int = 2) -> int:
    """Crash at every moment of `action`, and after it; the number of moments."""
    seen: dict[str, list[int]] = {kind: [] for kind in KINDS}

    def look(disk: Disk) -> None:
        for kind in KINDS:
            seen[kind].append(after_crash(disk, kind, scratch))

    with watched(folder, look) as disk:
        action()
    for kind, steps in seen.items():
        assert set(steps) <= {1, 2}, kind
        assert after_crash(disk, kind, scratch) == after, kind
    return disk.moments


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a checkpoint of step 1."""
    path = tmp_path / "checkpoints"
    path.mkdir()
    save(path, 1)
    return path


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_save_is_there_or_not(folder: Path, tmp_path: Path, order: tuple[int, ...]) -> None:
    moments = sweep(folder, lambda: save(folder, 2, order), tmp_path / "scratch")
    assert moments > 30, "the sweep saw too little"


def test_saving_and_removing_the_one_before(folder: Path, tmp_path: Path) -> None:
    def action() -> None:
        save(folder, 2)
        prune(folder, CheckpointConfig(keep=1))

    sweep(folder, action, tmp_path / "scratch")
    assert [path.name for path in folder.iterdir()] == [step_name(2)]


def test_the_same_step_again(folder: Path, tmp_path: Path) -> None:
    """After falling back: a damaged step 2 is written anew while step 1 stands."""
    save(folder, 2)
    sweep(folder, lambda: save(folder, 2), tmp_path / "scratch")


def write_without_sync(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def test_processes_killed_while_they_save(tmp_path: Path) -> None:
    """The same with SIGKILL at 40 random moments: what was said to be visible is, and all that is visible verifies."""
    command = [sys.executable, "-m", "tests.faults.killed_saves", str(tmp_path), "0", "40"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, timeout=120)
    assert not done.returncode, done.stderr.decode()
    lives = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lives) == 40
    newest = 1
    for life in lives:
        steps = [step for step, why in life["visible"] if not why]
        assert len(steps) == len(life["visible"]) in (1, 2, 3), life
        assert newest == life["from"] <= life["told"] <= steps[0] <= life["told"] + 1, life
        newest = steps[0]
    assert newest > 20 and sum(life["torn"] for life in lives) > 10, "too few were killed in the middle of a save"


MUTANTS: dict[str, Any] = {
    "no fsync at all": mock.patch.object(os, "fsync", lambda descriptor: None),
    "no fsync of folders": mock.patch.object(writing, "fsync_folder", lambda path: None),
    "no fsync of texts": mock.patch.object(writing, "_write_text", write_without_sync),
    "no rename": mock.patch.object(os, "rename", lambda old, new: shutil.copytree(old, new)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_sweep_finds_a_protocol_that_is_broken(folder: Path, tmp_path: Path, name: str) -> None:
    def action() -> None:
        with MUTANTS[name]:
            save(folder, 2)

    with pytest.raises(AssertionError):
        sweep(folder, action, tmp_path / "scratch")
