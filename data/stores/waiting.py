"""Who waits for a store: retries with a deadline, and a list of the reads that take long."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from millrace.data.stores.base import StoreError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a store is waited for, in seconds."""

    stall: float = 30.0  # without a byte, before the attempt is given up and made again
    deadline: float = 180.0  # for a read with all its attempts
    unknown: float = 20.0  # the same for a host that has taken no connection yet: rather misspelt than down
    pause: float = 0.1  # before the second attempt, then doubled
    longest_pause: float = 10.0


PATIENCE = Patience()


class Transient(Exception):
    """An attempt failed in a way that may pass.

    `answered`: the host is there, as it took the connection at least. `pause`: how long it asks to be left alone, in
    seconds.
    """

    def __init__(self, why: str, *, answered: bool = False, pause: float = 0.0) -> None:
        super().__init__(why)
        self.answered, self.pause = answered, pause


@dataclass(slots=True)
class _Wait:
    what: str
    since: float
    note: str = ""


_waits: dict[int, _Wait] = {}
_numbers = itertools.count()
_answered: set[str] = set()
_lock = threading.Lock()
_jitter = random.Random()  # not the module's: drawing from that would change what else is drawn from it


@contextmanager
def waiting(what: str) -> Iterator[_Wait]:
    """Let `stalls` know of a wait for a store while the block runs."""
    number, wait = next(_numbers), _Wait(what, time.monotonic())
    with _lock:
        _waits[number] = wait
    try:
        yield wait
    finally:
        with _lock:
            del _waits[number]


def stalls(seconds: float = 5.0) -> list[str]:
    """Reads of this process that have been under way for longer than `seconds`, the oldest first."""
    now = time.monotonic()
    with _lock:
        found = sorted(_waits.values(), key=lambda wait: wait.since)
    return [f"{w.what}, for {now - w.since:.0f} s{w.note}" for w in found if now - w.since >= seconds]


def persist(attempt: Callable[[float], T], what: str, host: str, patience: Patience) -> T:
    """Call `attempt(end)` until it succeeds; `end` is when, on the monotonic clock, it must be over.

    Pauses double, with jitter (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    Raises:
        StoreError: as `attempt`, or `Transient` failures until the deadline.
    """
    start = time.monotonic()
    with waiting(what) as wait:
        for tries in itertools.count(1):
            try:
                result = attempt(start + _allowed(host, patience))
            except Transient as error:
                if error.answered:
                    _answered.add(host)
                pause = min(patience.longest_pause, patience.pause * 2 ** min(tries - 1, 30)) * _jitter.uniform(0.5, 1)
                pause = max(pause, error.pause)
                if time.monotonic() + pause >= start + _allowed(host, patience):
                    passed = time.monotonic() - start
                    raise StoreError(f"cannot read {what}: {error}; tried {tries} times in {passed:.1f} s") from None
                wait.note = f" (attempt {tries}: {error})"
                time.sleep(pause)
            else:
                _answered.add(host)
                return result
    raise AssertionError


def _allowed(host: str, patience: Patience) -> float:
    return patience.deadline if host in _answered else min(patience.deadline, patience.unknown)
