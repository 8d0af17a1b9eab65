"""One owner of a run directory at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from millrace.core import lease
from millrace.core.errors import UserError
from millrace.core.lease import LeaseLost, acquire

HOLD = (
    "import sys, time; from pathlib import Path; from millrace.core import lease\n"
    "lease._TOUCHED = 0.05\n"
    "held = lease.acquire(Path(sys.argv[1])); print(held.number, flush=True); time.sleep(60)"
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRES", 1.0)
    monkeypatch.setattr(lease, "_TOUCHED", 0.05)
    monkeypatch.setattr(lease, "_SAY_AFTER", 0.2)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process were on another machine: no other can be looked up."""
    monkeypatch.setattr(lease, "_machine", lambda: "another")


@pytest.fixture
def living(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.wait()


def test_numbers_rise_and_few_are_kept(tmp_path: Path) -> None:
    for number in range(1, 8):
        with acquire(tmp_path) as held:
            assert held.number == number
            held.check()
    assert len(os.listdir(tmp_path / "lease")) == 3


def test_a_living_owner_on_this_machine_is_waited_for_and_refused(
    tmp_path: Path, quick: None, living: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=rf"being written by process {living.pid} on .*set run.name to a new name"):
        acquire(tmp_path)
    assert f"is owned by process {living.pid}" in capsys.readouterr().err


def test_an_owner_that_ends_meanwhile_is_followed(tmp_path: Path, living: subprocess.Popen[str]) -> None:
    threading.Timer(0.5, living.kill).start()
    with acquire(tmp_path) as held:
        assert held.number == 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the run directory .*file/run: .*Not a directory"):
        acquire(tmp_path / "file" / "run")


def test_a_killed_owner_on_this_machine_is_followed_at_once(tmp_path: Path, living: subprocess.Popen[str]) -> None:
    living.kill()  # and not waited for: a zombie is dead
    while lease._started(living.pid):
        time.sleep(0.01)
    began = time.monotonic()
    with acquire(tmp_path) as held:
        assert held.number == 2 and time.monotonic() - began < 1


def test_a_number_that_another_process_has_now_is_not_the_owner(tmp_path: Path) -> None:
    with acquire(tmp_path) as held:
        other = replace(held.owner, started="1")
        assert held.owner.alive() is True and other.alive() is False


def test_a_living_owner_elsewhere_is_seen_by_its_touch(
    tmp_path: Path, quick: None, foreign: None, living: subprocess.Popen[str]
) -> None:
    with pytest.raises(UserError, match="is being written by process"):
        acquire(tmp_path)


def test_a_dead_owner_elsewhere_is_followed_when_its_file_stands_still(
    tmp_path: Path, quick: None, foreign: None, living: subprocess.Popen[str]
) -> None:
    living.kill()
    began = time.monotonic()
    with acquire(tmp_path) as held:
        assert held.number == 2 and 0.9 < time.monotonic() - began < 5


def test_an_owner_that_was_paused_writes_nothing_more(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused = acquire(tmp_path)
    monkeypatch.setattr(paused, "_touch", lambda: None)  # its threads stand still
    monkeypatch.setattr(lease, "_machine", lambda: "another")
    with acquire(tmp_path) as successor:
        monkeypatch.undo()
        monkeypatch.setattr(lease, "EXPIRES", 1.0)
        with pytest.raises(LeaseLost, match=rf"belongs to process {os.getpid()} on .* now"):
            paused.check()
        with pytest.raises(LeaseLost):
            paused.check()  # for ever
        paused.release()
        successor.check()
    assert json.loads((tmp_path / "lease" / "00000002.json").read_text())["released"]
    assert not json.loads((tmp_path / "lease" / "00000001.json").read_text())["released"]


def test_a_stopped_process_is_fenced_off(tmp_path: Path, quick: None, foreign: None) -> None:
    """A real one: SIGSTOP, taken over, SIGCONT."""
    code = HOLD.replace("time.sleep(60)", "\nwhile True: time.sleep(0.01); held.check(); print('writes', flush=True)")
    code = code.replace("lease._TOUCHED = 0.05", "lease._TOUCHED = 0.05; lease.EXPIRES = 1.0")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    try:
        process.send_signal(signal.SIGSTOP)
        with acquire(tmp_path) as held:
            assert held.number == 2
            process.send_signal(signal.SIGCONT)
            out, err = process.communicate(timeout=30)
        assert process.returncode == 1 and "LeaseLost" in err
    finally:
        process.kill()
        process.wait()


def _compete(folder: str, numbers: multiprocessing.Queue[int | None]) -> None:
    try:
        numbers.put(acquire(Path(folder)).number)
    except UserError:
        numbers.put(None)
    time.sleep(4)


def test_of_many_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRES", 1.0)
    context = multiprocessing.get_context("fork")
    numbers: multiprocessing.Queue[int | None] = context.Queue()
    processes = [context.Process(target=_compete, args=(str(tmp_path), numbers)) for _ in range(12)]
    for process in processes:
        process.start()
    found = [numbers.get(timeout=30) for _ in processes]
    for process in processes:
        process.kill()
        process.join()
    assert [number for number in found if number is not None] == [1]


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = threading.active_count()
    with acquire(tmp_path):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
