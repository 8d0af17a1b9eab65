"""Processes that prepare one folder together, started by whoever (see `millrace.engine.distributed`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Ranks(Protocol):
    """Who prepares one folder together."""

    @property
    def rank(self) -> int:
        """This one."""

    @property
    def size(self) -> int:
        """How many there are."""

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` gives on rank 0, on all of them; its UserError is raised by all."""

    def barrier(self) -> None:
        """Wait for all."""


class Alone:
    """One rank."""

    rank, size = 0, 1

    def on_main(self, action: Callable[[], T]) -> T:
        """Do it."""
        return action()

    def barrier(self) -> None:
        """Nobody is waited for."""
