"""Faults that only a rank can bring about at the right moment: the supervisor leaves an order, the rank takes it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from millrace.core.rundir import write_atomic


def give(folder: Path, rank: int, kind: str) -> Path:
    """Ask `rank` for a fault of this kind; the file that is there once it was taken."""
    taken = folder / f"taken-{rank}-{kind.replace(' ', '-')}"
    taken.unlink(missing_ok=True)
    write_atomic(folder / f"order-{rank}.json", json.dumps({"kind": kind, "taken": str(taken)}))
    return taken


class Orders:
    """The rank's side; the folder, the rank and the number of the start are in the environment."""

    def __init__(self) -> None:
        self.rank, self.start = int(os.environ["RANK"]), int(os.environ["SOAK_START"])
        folder = Path(os.environ["SOAK_FOLDER"])
        self._path = folder / f"order-{self.rank}.json"
        (folder / f"rank-{self.rank}.pid").write_text(str(os.getpid()))

    def take(self, kind: str) -> bool:
        """Whether a fault of this kind is asked for now; it then counts as done."""
        try:
            order = json.loads(self._path.read_text())
        except FileNotFoundError:
            return False
        if order["kind"] != kind:
            return False
        os.rename(self._path, order["taken"])
        return True
