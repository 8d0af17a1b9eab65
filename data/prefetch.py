"""Batches prepared ahead in a background thread, bounded by their bytes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from millrace.core.console import warn

T = TypeVar("T", bound=Any)  # something with `nbytes`

_SAY_AFTER = 10.0  # seconds without a batch until the user is told
_NAMED = 3  # reads that the message names


class Prefetcher(Generic[T]):
    """Calls `make` ahead of `next`, as long as what waits has less than `limit` bytes; one batch always may wait."""

    def __init__(self, make: Callable[[], T], limit: int, stalls: Callable[[], list[str]]) -> None:
        """`stalls` names the reads that take long, for the message."""
        self._make, self._limit, self._stalls = make, limit, stalls
        self._ready: deque[T | BaseException] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="millrace-loader", daemon=True)

    def next(self) -> T:
        """The next batch; waits for it, and says so after a while.

        Raises:
            StopIteration: another thread closed this one meanwhile.
            BaseException: what `make` raised.
        """
        if self._thread.ident is None:
            self._thread.start()
        began = time.monotonic()
        said = 0.0
        with self._changed:
            while not self._ready and not self._closed:
                self._changed.wait(1.0)
                waited = time.monotonic() - began
                if waited >= max(_SAY_AFTER, 2 * said):
                    said = waited
                    reads = f"; reading: {', '.join(self._stalls()[:_NAMED])}" if self._stalls() else ""
                    warn(f"the prefetched batches are used up, and no new one came for {waited:.0f} s{reads}")
            if self._closed:
                raise StopIteration
            item = self._ready.popleft()
            if isinstance(item, BaseException):
                raise item
            self._bytes -= item.nbytes
            self._changed.notify_all()
            return item

    def _run(self) -> None:
        while not self._closed:
            try:
                item: T | BaseException = self._make()
            except BaseException as error:  # travels to the consumer
                item = error
            with self._changed:
                self._ready.append(item)
                self._bytes += 0 if isinstance(item, BaseException) else item.nbytes
                self._changed.notify_all()
                if isinstance(item, BaseException):
                    return
                while self._bytes >= self._limit and not self._closed:
                    self._changed.wait()

    def close(self) -> None:
        """End the thread after the batch that it is making."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
