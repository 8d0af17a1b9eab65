"""Locks that a killed build of DeepSpeed's operators left, and which build is used."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from millrace.engine import ops

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir()
    return path


def holder(lock: Path) -> subprocess.Popen[str]:
    """A process that builds, as torch does it."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def test_a_lock_left_by_sigkill_is_removed_and_a_live_one_is_kept(
    lock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child = holder(lock)
    try:
        assert ops.remove_stale_locks(tmp_path) == []
        assert lock.exists()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert lock.exists(), "the kill should leave the lock"
    began = time.monotonic()
    assert ops.remove_stale_locks(tmp_path) == [lock]
    assert time.monotonic() - began < 10
    assert f"removed {lock}, which a build that was killed had left" in capsys.readouterr().err
    assert not lock.exists() and FileBaton(str(lock)).try_acquire()


def test_a_lock_of_this_very_process_is_kept(lock: Path, tmp_path: Path) -> None:
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert ops.remove_stale_locks(tmp_path) == []
    baton.release()
    assert ops.remove_stale_locks(tmp_path) == []


def test_locks_below_a_versioned_folder_are_found(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert ops.remove_stale_locks(tmp_path) == [lock]


def test_on_a_shared_file_system_age_decides(lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host may hold it, which cannot be seen from here."""
    monkeypatch.setattr(ops, "_is_shared", lambda path: True)
    lock.touch()
    assert ops.remove_stale_locks(tmp_path) == []
    old = time.time() - ops.OLDEST_BUILD_SECONDS - 1
    os.utime(lock, (old, old))
    assert ops.remove_stale_locks(tmp_path) == [lock]


def test_which_file_systems_are_shared(tmp_path: Path) -> None:
    assert not ops._is_shared(tmp_path)
    assert not ops._is_shared(Path("/proc/self"))


def test_without_locks_nothing_is_written(tmp_path: Path) -> None:
    assert ops.remove_stale_locks(tmp_path) == [] and list(tmp_path.iterdir()) == []
    assert ops.remove_stale_locks(tmp_path / "absent") == []


REMOVE = """
import sys, time
from pathlib import Path
from torch.utils.file_baton import FileBaton
from millrace.engine.ops import remove_stale_locks
folder = Path(sys.argv[1])
remove_stale_locks(folder)
baton = FileBaton(str(folder / "deepspeed_shm_comm" / "lock"))
if baton.try_acquire():
    time.sleep(1.0)
    baton.release()  # fails when another has removed it
else:
    baton.wait()
"""


def test_many_ranks_at_once_never_remove_each_others_lock(lock: Path, tmp_path: Path) -> None:
    lock.touch()
    command = [sys.executable, "-c", REMOVE, str(tmp_path)]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ended = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, ended
    assert not lock.exists()


def test_the_build_of_this_environment_is_used_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tmp_path / "torch_extensions"
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    ops.use_operators()
    assert ops.VARIABLE not in os.environ
    built.mkdir()
    ops.use_operators()
    assert os.environ[ops.VARIABLE] == str(built)
    monkeypatch.setenv(ops.VARIABLE, str(tmp_path / "mine"))
    ops.use_operators()
    assert os.environ[ops.VARIABLE] == str(tmp_path / "mine")


def test_without_a_compiler_the_operator_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.ops

    table = dict(deepspeed.ops.__compatible_ops__)
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", table)
    monkeypatch.setenv(ops.VARIABLE, str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    (tmp_path / ops.SHARED_MEMORY).mkdir()
    (tmp_path / ops.SHARED_MEMORY / f"{ops.SHARED_MEMORY}.so").touch()
    ops.use_operators()
    assert table[ops.SHARED_MEMORY]
    (tmp_path / ops.SHARED_MEMORY / f"{ops.SHARED_MEMORY}.so").unlink()
    ops.use_operators()
    assert not table[ops.SHARED_MEMORY]


def test_another_ninja_on_the_path_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of ninja do not believe each other: what one built, the other builds again."""
    for folder in ("bin", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ninja").touch(mode=0o755)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    ops.find_ninja()
    assert shutil.which("ninja") == str(tmp_path / "bin" / "ninja")
    path = os.environ["PATH"]
    ops.find_ninja()
    assert os.environ["PATH"] == path


def test_ninja_of_the_environment_is_found_and_without_any_the_operator_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed.ops

    table = dict(deepspeed.ops.__compatible_ops__)
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", table)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv(ops.VARIABLE, str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    ninja = tmp_path / "bin" / "ninja"
    ninja.parent.mkdir()
    ninja.touch(mode=0o755)
    ops.use_operators()
    assert shutil.which("ninja") == str(ninja) and table[ops.SHARED_MEMORY]
    ninja.unlink()
    ops.use_operators()
    assert not table[ops.SHARED_MEMORY]
