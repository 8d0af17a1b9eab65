"""What can happen to a checkpoint while a job is down."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path


def newest(folder: Path) -> Path | None:
    """The newest checkpoint by the number in its name, whole or not."""
    return max(_all(folder), key=number, default=None)


def count(folder: Path) -> int:
    """How many checkpoints there are."""
    return len(_all(folder))


def _all(folder: Path) -> list[Path]:
    """`step-00000020`, `checkpoint-20`; not what is still being written under another name."""
    return [p for p in folder.glob("*") if re.fullmatch(r"(step|checkpoint)-\d+", p.name) and p.is_dir()]


def number(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.rpartition("-")[2])


def identity(path: Path) -> tuple[int, int]:
    """Differs from that of another checkpoint of the same step that took its place; damage does not change it."""
    return number(path), path.stat().st_mtime_ns


def place(checkpoint: Path, at: float) -> tuple[Path, int]:
    """(file, offset) of the byte at the share `at` of all bytes of a checkpoint, its files in order of their names."""
    files = [(path, path.stat().st_size) for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    offset = int(at * sum(size for _, size in files))
    for path, size in files:
        if offset < size:
            return path, offset
        offset -= size
    raise ValueError(f"{checkpoint} holds no bytes")


def tear(checkpoint: Path, at: float) -> str:
    """Cut off the file in which the byte at `at` lies, there; says which."""
    path, offset = place(checkpoint, at)
    os.truncate(path, offset)
    return f"{path.relative_to(checkpoint)} cut off at byte {offset}"


def flip(checkpoint: Path, at: float, bit: int) -> str:
    """Flip one bit of the byte at `at`; says of which file."""
    path, offset = place(checkpoint, at)
    with open(path, "r+b") as file:
        file.seek(offset)
        (value,) = file.read(1)
        file.seek(offset)
        file.write(bytes([value ^ 1 << bit]))
    return f"bit {bit} of byte {offset} of {path.relative_to(checkpoint)}"


def remove(checkpoint: Path) -> None:
    """What an engineer does by hand with a checkpoint from which the job does not start."""
    shutil.rmtree(checkpoint)
