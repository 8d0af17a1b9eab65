"""What was used last, kept in memory up to a limit; shared by threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Values by key. At least the newest stays; of the threads that miss at once, one makes it and the others wait."""

    def __init__(self, limit: int, weigh: Callable[[T], int] = lambda _: 1) -> None:
        """Keep values whose weights (by default one each) sum to at most `limit`."""
        self._limit, self._weigh = limit, weigh
        self._kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._making: dict[Hashable, Future[T]] = {}
        self._weight = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of `key`, made where it is not kept; raises what `make` does, here and wherever it is awaited."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
            making = self._making.get(key)
            if making is None:
                mine = self._making[key] = Future()
        return self._make(key, make, mine) if making is None else making.result()

    def pop(self, key: Hashable) -> T | None:
        """Forget a value, and return it if it was kept."""
        with self._lock:
            value, weight = self._kept.pop(key, (None, 0))
            self._weight -= weight
        return value

    def _make(self, key: Hashable, make: Callable[[], T], future: Future[T]) -> T:
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._kept[key] = value, self._weigh(value)
            self._weight += self._kept[key][1]
            while len(self._kept) > 1 and self._weight > self._limit:
                self._weight -= self._kept.popitem(last=False)[1][1]
        future.set_result(value)
        return value
