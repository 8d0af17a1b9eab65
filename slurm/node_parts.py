"""What is looked at on a node: its GPUs, its disks, and its talk with another node."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import Store

ROOM = 256 * 2**20  # free bytes, less than which no run gets far with
SKEW = 5.0  # seconds between two clocks; the lease and the ledger live with less
_BYTES = 2**20


def gpus(wanted: int) -> Iterator[str]:
    """What is wrong with this node's GPUs: too few, or one that multiplies wrong."""
    if not wanted:
        return
    import torch

    if (seen := torch.cuda.device_count()) < wanted:
        yield f"{seen} of {wanted} GPUs are visible"
    # Whole numbers: sums of products are exact in any order and precision.
    left, right = (torch.randint(-2, 3, (1024, 1024)).float() for _ in range(2))
    expected = left @ right
    for number in range(min(seen, wanted)):
        device = torch.device("cuda", number)
        try:
            if not torch.equal((left.to(device) @ right.to(device)).cpu(), expected):
                yield f"GPU {number} multiplies wrong"
        except RuntimeError as error:
            yield f"GPU {number}: {str(error).splitlines()[0]}"


def disk(folder: Path) -> Iterator[str]:
    """What is wrong with the disk below `folder`: a file that cannot be written or reads otherwise, or little room."""
    data = os.urandom(_BYTES)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if Path(file.name).read_bytes() != data:
                yield f"{folder}: a file reads otherwise than it was written"
        if (free := shutil.disk_usage(folder).free) < ROOM:
            yield f"{folder}: {free / 2**20:.0f} MiB are free"
    except OSError as error:
        yield f"{folder} cannot be written: {error}"


def talk(store: Store, place: int, seconds: float, device: str) -> str:
    """Add up a MiB with another node (we are number `place` of two) and compare clocks; what went wrong, or empty.

    `store` is one that only these two use. `device` is "cpu" (gloo) or a GPU (NCCL).
    """
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=max(0.1, seconds))
    try:
        if device == "cpu":
            group: Any = dist.ProcessGroupGloo(store, place, 2, limit)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            group = dist.ProcessGroupNCCL(store, place, 2, options)
        mine = torch.full((_BYTES // 4,), float(place + 1), device=device)
        group.allreduce([mine]).wait(limit)
        if not bool((mine == 3.0).all()):
            return "a sum over both came out wrong"
        return _skew(store, place, limit)
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        return f"no answer within {seconds:.0f} s" if "timeout" in first or "imed out" in first else first


def _skew(store: Store, place: int, limit: timedelta) -> str:
    """Right after a sum both know the same moment."""
    store.set_timeout(limit)
    store.set(f"time{place}", str(time.time()))
    apart = time.time() - float(store.get(f"time{1 - place}"))
    return f"their clocks are {abs(apart):.0f} s apart" if abs(apart) > SKEW else ""
