"""A file system that is full at any point of a save: the checkpoint before stays, and room is all that is needed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from millrace.engine.checkpoint.read import list_checkpoints, verdict
from millrace.engine.checkpoint.saver import Saver
from millrace.engine.checkpoint.slices import PlainAdapter

KIB = 1024
SIZE = 1024 * KIB


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of 13,000 parameters that one process steps."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    model = torch.nn.Linear(100, 130)
    made = PlainAdapter(
        SimpleNamespace(
            module=model, optimizer=torch.optim.AdamW(model.parameters()), zero_optimization_stage=lambda: 0
        )
    )
    made.allocate()
    return made


class Alone:
    """A world of one rank."""

    rank, size, main, device = 0, 1, True, torch.device("cpu")

    def gather_objects(self, item: Any) -> list[Any]:
        return [item]


@pytest.mark.parametrize("background", [False, True])
def test_full_at_any_point(small: Path, adapter: Any, background: bool) -> None:
    folder, filler = small / "checkpoints", small / "filler"
    saver = Saver(folder, adapter, Alone(), background=background)  # type: ignore[arg-type]
    extra = {"trainer": {"step": 1}, "files": {"model/config.json": "x" * 20_000}}

    def save(step: int) -> Any:
        saver.begin(step, extra)
        return saver.finish()

    assert save(1).bytes > 150_000
    needed = fails = 0
    for free in range(0, 400 * KIB, 8 * KIB):
        filler.unlink(missing_ok=True)
        room = 4096 * int(subprocess.check_output(["stat", "-f", "-c", "%a", str(small)]))
        filler.write_bytes(bytes(room - free))
        try:
            save(2)
        except OSError as error:
            assert re.search("could not write the checkpoint on rank 0: .*No space left on device", str(error))
        else:
            needed = free
            break
        fails += 1
        (only,) = folder.iterdir()
        assert only.name == "step-00000001" and not verdict(only)
    assert fails > 15 and 150 * KIB < needed < 300 * KIB, "it fails while there is no room, and then no longer"
    assert [path.name[-1] for path in list_checkpoints(folder)] == ["2", "1"]
