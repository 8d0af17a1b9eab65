"""DeepSpeed's own C++ operators: where the built ones lie, and locks that a killed build left.

DeepSpeed compiles an operator the first time a process needs it, under a lock file that `torch.utils.file_baton` keeps
open for as long as it builds, and then removes. A build that was killed leaves the file, and every later process would
wait for it for ever. `millrace.launch.build_ops` builds them ahead, into the virtual environment.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from millrace.core.console import say

VARIABLE = "TORCH_EXTENSIONS_DIR"
SHARED_MEMORY = "deepspeed_shm_comm"  # collectives among ranks of one host, on a CPU
# A build takes a minute or two. On a file system that other hosts share, their processes cannot be seen from here.
OLDEST_BUILD_SECONDS = 900.0
_BETWEEN_LOOKS_SECONDS = 0.2
_SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "9p", "afs", "orangefs", "glusterfs", "fuse")


def prebuilt_folder() -> Path:
    """Where `make` builds this environment's operators."""
    return Path(sys.prefix) / "torch_extensions"


def extensions_folder() -> Path:
    """Where torch looks for operators of this process; below it, each has a folder of its own."""
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    # torch adds a folder for the Python and accelerator version here, which is searched as well.
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def use_operators() -> None:
    """Make this process use the operators built by `make`, and wait for nobody who has died.

    To be called on every rank before DeepSpeed joins the process group. Where it can be neither found nor built, the
    shared-memory operator is switched off: collectives then go through gloo.
    """
    import torch

    find_ninja()
    if VARIABLE not in os.environ and prebuilt_folder().is_dir():
        os.environ[VARIABLE] = str(prebuilt_folder())
    folder = extensions_folder()
    remove_stale_locks(folder)
    built = any(folder.glob(f"**/{SHARED_MEMORY}.so"))
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler and not built and os.environ.get("LOCAL_RANK", "0") == "0" and not torch.cuda.is_available():
        say(f"compiling DeepSpeed's {SHARED_MEMORY} into {folder}, once: about a minute")
    # torch asks ninja even about what is built already.
    if shutil.which("ninja") is None or not (built or compiler):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__[SHARED_MEMORY] = False


def find_ninja() -> None:
    """Make the environment's own ninja the one on the PATH, whether or not the environment was activated.

    What one version of ninja built, another builds again.
    """
    ours = Path(sys.prefix) / "bin"
    if (ours / "ninja").exists() and shutil.which("ninja") != str(ours / "ninja"):
        os.environ["PATH"] = os.pathsep.join([str(ours), os.environ.get("PATH", os.defpath)])


def remove_stale_locks(folder: Path) -> list[Path]:
    """Remove the lock files below `folder` that no build holds any more; say so and return them.

    A lock is held while a process of this host has it open. Where other hosts share the file system, a lock that nobody
    here has open is left alone until it is 15 minutes old.
    """
    if not any(_locks(folder)):
        return []
    removed = []
    with _one_at_a_time(folder):
        for lock in _locks(folder):
            if _is_stale(lock):
                lock.unlink(missing_ok=True)
                say(f"removed {lock}, which a build that was killed had left")
                removed.append(lock)
    return removed


def _locks(folder: Path) -> Iterator[Path]:
    """FOLDER/NAME/lock, and FOLDER/PYTHON_ACCELERATOR/NAME/lock."""
    for pattern in ("*/lock", "*/*/lock"):
        yield from folder.glob(pattern)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Else a rank could judge an old lock and then remove the new one, which another rank has just taken."""
    with open(folder / ".stale-locks", "a") as guard:
        with contextlib.suppress(OSError):  # not every network file system can do it
            fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def _is_stale(lock: Path) -> bool:
    """Two looks: a process takes its lock, and gives it up, in two system calls each."""
    with contextlib.suppress(FileNotFoundError):
        first = lock.stat()
        if _is_open(first):
            return False
        if _is_shared(lock) and time.time() - first.st_mtime < OLDEST_BUILD_SECONDS:
            return False
        time.sleep(_BETWEEN_LOOKS_SECONDS)
        second = lock.stat()
        return second.st_ino == first.st_ino and not _is_open(second)
    return False


def _is_open(status: os.stat_result) -> bool:
    """Whether a process of this host that may be looked at has this file open."""
    wanted = (status.st_dev, status.st_ino)
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found = descriptor.stat()
            if (found.st_dev, found.st_ino) == wanted:
                return True
    return False


def _is_shared(path: Path) -> bool:
    """Whether `path` lies on a file system that other hosts may write to."""
    best, kind = "", ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, point, this_kind, *_ = line.split()
            point = point.replace("\\040", " ")
            inside = path.resolve().is_relative_to(point)
            if inside and len(point) >= len(best):
                best, kind = point, this_kind
    return kind.startswith(_SHARED)
