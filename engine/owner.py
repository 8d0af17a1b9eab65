"""Owning a run directory, as seen from every rank: rank 0 holds the lease."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.core.errors import UserError
from millrace.core.lease import Lease, acquire
from millrace.core.rundir import RunDir
from millrace.engine.distributed import World


@dataclass(frozen=True)
class Ownership:
    """The fencing token `number`, on every rank, and on rank 0 the lease."""

    number: int
    lease: Lease | None

    def lost(self) -> bool:
        """Whether rank 0 knows that another process took over; False elsewhere."""
        return self.lease is not None and self.lease.lost()

    def check(self) -> None:
        """Call this on rank 0 before something is made visible; raises `LeaseLost`."""
        if self.lease is not None:
            self.lease.check()


def taken_over(run: Path) -> UserError:
    """What an owner that was replaced says, on every rank."""
    return UserError(
        f"{run} was taken over by another process while this one stood still; nothing more is written here"
    )


@contextmanager
def owned(rundir: RunDir, fingerprint: dict[str, Any], world: World) -> Iterator[Ownership]:
    """Own the directory of the run with this `fingerprint` while the block runs; call it on every rank.

    Raises:
        UserError: on every rank: it holds another run, which is left as it was; or another process owns it, and lives.
    """
    held: list[Lease] = []

    def take() -> int:
        rundir.check(fingerprint)
        held.append(acquire(rundir.path))
        return held[0].number

    try:
        yield Ownership(world.on_main(take), held[0] if held else None)
    finally:
        for lease in held:
            lease.release()
