"""Calls that may never return, such as questions to a server, with a limit of time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def bounded(call: Callable[[], T], seconds: float) -> T:
    """`call()` on a daemon thread, which is left behind where it takes longer.

    Raises:
        TimeoutError: there was no answer after `seconds`.
        Exception: what `call` raises; RuntimeError for a SystemExit and its like.
    """
    outcome: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()

    def work() -> None:
        try:
            outcome.put((call(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=work, name="millrace-bounded", daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None
    if error is not None:
        raise error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
    return result  # type: ignore[return-value]
