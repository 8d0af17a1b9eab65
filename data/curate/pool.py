"""Worker processes that end with their parent.

datatrove's `LocalPipelineExecutor` is not used: killed, it leaves its manager and its workers behind, which go on
writing the files that the next start writes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from millrace.core.errors import UserError

T = TypeVar("T")


class Pool:
    """`workers` processes, started with the first call; none where `workers` is 1."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def each(self, function: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, T]]:
        """Yield (number of the call, its result) as they end, in any order.

        Raises:
            UserError: a worker was killed; and whatever a call raises.
        """
        if self._workers == 1 or len(calls) < 2:
            yield from ((number, function(*call)) for number, call in enumerate(calls))
            return
        if self._executor is None:
            context = multiprocessing.get_context("spawn")  # pyarrow's threads do not survive a fork
            self._executor = ProcessPoolExecutor(self._workers, context, _start)
        futures = {self._executor.submit(function, *call): number for number, call in enumerate(calls)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker was killed, for want of memory most likely; run the same command with fewer --workers"
            ) from None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._executor is None:
            return
        if kind is not None:
            for process in list((self._executor._processes or {}).values()):
                process.kill()  # what they were doing is done anew: files appear whole
        self._executor.shutdown(cancel_futures=True)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
