"""A crash at every write, fsync, rename and removal of a save: the run goes on from the last good checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from millrace.engine.checkpoint import write as writing
from millrace.engine.checkpoint.read import list_checkpoints, open_newest, remove_leftovers, verdict
from millrace.engine.checkpoint.retention import prune
from millrace.engine.checkpoint.write import Content, Slice, commit, step_name, write_rank
from millrace.engine.config import CheckpointConfig
from tests.faults.crash import KINDS, Disk, restore, watched

RANKS = 2


def content(step: int, rank: int) -> Content:
    generator = torch.Generator().manual_seed(100 * step + rank)
    slices = [Slice(f"model|layer{n}|{s}", rank * 8, torch.randn(8, generator=generator))
              for n in range(3) for s in ("master", "exp_avg")]  # fmt: skip
    facts = {"format": writing.FORMAT, "step": step, "world": RANKS, "params": {}, "states": ["master", "exp_avg"]}
    files = {"config.toml": "x = 1\n", "model/config.json": "{}"}
    return Content(rank, slices, {"buffer": torch.ones(3)}, {"trainer": {"step": step}, "files": files}, facts)


def save(folder: Path, step: int, order: tuple[int, ...] = (0, 1)) -> None:
    temporary = folder / f"{step_name(step)}.tmp-1"
    for rank in order:
        write_rank(temporary, content(step, rank))
    commit(temporary, folder / step_name(step), content(step, 0), None)


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
