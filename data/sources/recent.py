"""What was used last, kept in memory up to a limit; shared by threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Values by key. At least the newest stays; two threads that miss at once may both make it."""

    def __init__(self, limit: int, weigh: Callable[[T], int] = lambda _: 1) -> None:
        """Keep values whose weights (by default one each) sum to at most `limit`."""
        self._limit, self._weigh = limit, weigh
        self._kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._weight = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of `key`, made where it is not kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        value = make()
        with self._lock:
            self._weight -= self._kept.pop(key, (value, 0))[1]
            self._kept[key] = value, self._weigh(value)
            self._weight += self._kept[key][1]
            while len(self._kept) > 1 and self._weight > self._limit:
                self._weight -= self._kept.popitem(last=False)[1][1]
        return value
