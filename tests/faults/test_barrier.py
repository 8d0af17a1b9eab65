"""A checkpoint is made visible only when all ranks have written: two ranks, one of them slow, in two threads."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.core.errors import UserError
from millrace.engine.checkpoint import saver as saving
from millrace.engine.checkpoint.read import list_checkpoints, verdict
from millrace.engine.checkpoint.saver import Saver
from tests.faults.saves import RANKS, content


class Meeting:
    """What the ranks' `gather_objects` share."""

    def __init__(self) -> None:
        self.barrier, self.items = threading.Barrier(RANKS, timeout=30), [None] * RANKS

    def gather(self, rank: int, item: Any) -> list[Any]:
        self.items[rank] = item
        self.barrier.wait()
        found = list(self.items)
        self.barrier.wait()
        return found


class Rank:
    """A world as one of the threads sees it."""

    size, device = RANKS, torch.device("cpu")

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.main, self._meeting = rank, rank == 0, meeting

    def gather_objects(self, item: Any) -> list[Any]:
        return self._meeting.gather(self.rank, item)


@pytest.fixture
def slow_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks write what `content` says, and rank 1 begins to long after rank 0 has ended."""
    write = saving.write_rank

    def write_slowly(temporary: Path, what: Any) -> None:
        time.sleep(0.5 * what.rank)
        write(temporary, what)

    monkeypatch.setattr(saving, "write_rank", write_slowly)
    monkeypatch.setattr(saving, "owned_slices", lambda rank: content(1, rank).slices)
    monkeypatch.setattr(saving, "fixed_tensors", lambda rank: content(1, rank).fixed)
    monkeypatch.setattr(saving, "facts", lambda rank, step: content(step, rank).facts)


def save_together(folder: Path, background: bool) -> None:
    """Both ranks save step 1; it is visible and verifies."""
    meeting = Meeting()

    def save(rank: int) -> None:
        world: Any = Rank(rank, meeting)
        saver = Saver(folder, rank, world, background=background)  # type: ignore[arg-type]
        saver.begin(1, content(1, rank).extra)
        saver.finish()

    with ThreadPoolExecutor(RANKS) as ranks:
        for done in [ranks.submit(save, rank) for rank in range(RANKS)]:
            done.result()
    (only,) = list_checkpoints(folder)
    assert not verdict(only)


@pytest.mark.usefixtures("slow_rank")
@pytest.mark.parametrize("background", [False, True])
def test_the_slowest_is_waited_for(tmp_path: Path, background: bool) -> None:
    save_together(tmp_path, background)


@pytest.mark.usefixtures("slow_rank")
def test_an_owner_that_was_replaced_says_so_instead_of_blaming_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new owner removed what this one had half written when it was stopped."""

    class Replaced:
        number = 1

        def lost(self) -> bool:
            return True

    def write(temporary: Path, what: Any) -> None:
        raise FileNotFoundError(temporary / "rank-00000.json")

    monkeypatch.setattr(saving, "write_rank", write)
    world: Any = Rank(0, Meeting())
    monkeypatch.setattr(world, "gather_objects", lambda item: [item])
    saver = Saver(tmp_path / "run" / "checkpoints", 0, world, Replaced(), background=True)  # type: ignore[arg-type]
    saver.begin(1, {})
    with pytest.raises(UserError, match="run was taken over by another process while this one stood still"):
        saver.finish()


@pytest.mark.usefixtures("slow_rank")
def test_without_the_barrier_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above is worth: rank 0 that asks nobody finds no file of rank 1."""

    def raise_here(self: Saver, error: str | None) -> None:
        if error:
            raise OSError(error)

    monkeypatch.setattr(Saver, "_raise_everywhere", raise_here)
    with pytest.raises(OSError, match="rank-00001"):
        save_together(tmp_path, True)
    assert not list_checkpoints(tmp_path)
