"""The lease of a run directory: one owner at a time, and an owner that lost it never writes again.

Owner number N holds RUN/lease/N.json, made by an exclusive hard link, so that only one process can become owner N; the
highest number owns the run. The owner touches its file every few seconds. Another process takes over only when that
file stands still for `EXPIRES` seconds of its own clock (no two machines' clocks are compared), or at once where the
owner is known to be dead. An owner that could not touch it for half that time looks again before it writes.

The number is a fencing token (Kleppmann, "How to do distributed locking", 2016): it is in the names of unfinished
checkpoints and in the ledger's records, so that what a paused owner still writes is not taken for its successor's.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from millrace.core.console import say
from millrace.core.errors import UserError

EXPIRES = 20.0  # seconds without a sign of life until a run is taken over
_TOUCHED = 4.0  # seconds between signs of life
_KEPT = 3  # files of earlier owners
_SAY_AFTER, _LOOKS = 1.0, 0.2  # seconds, while waiting


class LeaseLost(OSError):
    """Another process owns the run directory now; this one must write nothing more."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lease."""

    number: int
    host: str
    pid: int
    started: str  # when the process began, in the kernel's ticks: a number is used again, this pair is not
    machine: str  # of this boot, and of this space of process numbers
    job: str
    released: bool = False

    def alive(self) -> bool | None:
        """Whether its process runs; None where that cannot be seen from here."""
        if self.released:
            return False
        return _started(self.pid) == self.started if self.machine and self.machine == _machine() else None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" (job {self.job})" if self.job else "")


class Lease:
    """The lease that this process holds; made by `acquire`, given back by `release` or as a context manager."""

    def __init__(self, folder: Path, owner: Owner) -> None:
        self.owner, self._folder = owner, folder
        self._touched, self._lost = time.monotonic(), False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="millrace-lease", daemon=True)
        self._thread.start()

    @property
    def number(self) -> int:
        """The fencing token: higher than that of every earlier owner."""
        return self.owner.number

    def lost(self) -> bool:
        """Whether another process took over; costs nothing while the signs of life go out in time."""
        if time.monotonic() - self._touched > EXPIRES / 2:
            self._touch()
        return self._lost

    def check(self) -> None:
        """Call this before anything is written.

        Raises:
            LeaseLost: another process took over.
        """
        if self.lost():
            raise LeaseLost(
                f"{self._folder.parent} belongs to {_newest(self._folder)} now; this process did not show itself for "
                f"{EXPIRES:.0f} s, and writes nothing more"
            )

    def _touch(self) -> None:
        newest = _newest(self._folder)
        self._lost = newest is None or newest.number != self.number
        if not self._lost:
            now = time.monotonic()  # before the file is touched: the successor's clock starts after it
            os.utime(_path(self._folder, self.number))
            self._touched = now

    def _live(self) -> None:
        while not self._ended.wait(_TOUCHED) and not self._lost:
            with contextlib.suppress(OSError):  # a full or absent disk: `check` looks again
                self._touch()

    def release(self) -> None:
        """Give it back: the next owner need not wait."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._touch()
            if self._lost:
                return
            _write(self._folder, {**_plain(self.owner), "released": True}, replace=True)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def acquire(run: Path) -> Lease:
    """Become the owner of the run directory `run`; waits for up to `EXPIRES` seconds for another to end.

    Raises:
        UserError: another process owns it, and lives; or the directory cannot be written.
    """
    folder = run / "lease"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            before = _newest(folder)
            if before is not None and _lives(run, before):
                raise UserError(
                    f"{run} is being written by {before}; two processes would damage each other's run: wait for it, "
                    "end it (SIGTERM lets it save), or set run.name to a new name"
                )
            mine = _myself(before.number + 1 if before else 1)
            if _write(folder, _plain(mine)):
                for old in _numbers(folder)[:-_KEPT]:
                    _path(folder, old).unlink(missing_ok=True)
                return Lease(folder, mine)
    except OSError as error:
        raise UserError(f"cannot write the run directory {run}: {error}") from None


def holder(run: Path) -> Owner | None:
    """Who owns the run directory `run`, or owned it last; None where nobody did."""
    return _newest(run / "lease") if (run / "lease").is_dir() else None


def _myself(number: int) -> Owner:
    return Owner(
        number=number,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        machine=_machine(),
        job=os.environ.get("SLURM_JOB_ID", ""),
    )


def _lives(run: Path, owner: Owner) -> bool:
    """Whether `owner` still lives after `EXPIRES` seconds; False as soon as it is known to be dead, or succeeded."""
    path, began, touched, said = _path(run / "lease", owner.number), time.monotonic(), False, False
    seen = _stamp(path)
    while (alive := owner.alive()) is not False and _newest(run / "lease") == owner:
        touched = touched or _stamp(path) != seen
        waited = time.monotonic() - began
        if waited > EXPIRES:
            return alive or touched
        if waited > _SAY_AFTER and not said:
            said = True
            say(f"{run} is owned by {owner}; waiting up to {EXPIRES:.0f} s for it to end")
        time.sleep(_LOOKS)
    return False


def _stamp(path: Path) -> object:
    try:
        stat = path.stat()
    except FileNotFoundError:  # a later owner removed it
        return None
    return stat.st_mtime_ns, stat.st_ino


def _numbers(folder: Path) -> list[int]:
    return sorted(int(name[:-5]) for name in os.listdir(folder) if name.endswith(".json") and name[:-5].isdigit())


def _newest(folder: Path) -> Owner | None:
    while numbers := _numbers(folder):
        with contextlib.suppress(FileNotFoundError):
            return Owner(**json.loads(_path(folder, numbers[-1]).read_text()))
    return None


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.json"


def _plain(owner: Owner) -> dict[str, object]:
    return {name: getattr(owner, name) for name in Owner.__dataclass_fields__}


def _write(folder: Path, plain: dict[str, object], replace: bool = False) -> bool:
    """Write an owner's file, whole from its first moment; False where another process was first."""
    assert isinstance(plain["number"], int)
    temporary, path = folder / f".{os.getpid()}-{socket.gethostname()}.tmp", _path(folder, plain["number"])
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(plain, file)
        file.flush()
        os.fsync(file.fileno())
    try:
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _started(pid: int) -> str:
    """When a process began, in ticks since the boot; empty when there is none, or a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    """This boot and this space of process numbers: within them a process can be looked up."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return ""
