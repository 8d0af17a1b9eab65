"""Prefetching by bytes."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from millrace.data import prefetch
from millrace.data.frames import Frame
from millrace.data.prefetch import Prefetcher


def test_what_waits_is_bounded_by_bytes() -> None:
    made = []

    def make() -> Frame:
        made.append(len(made))
        return Frame({"number": made[-1]}, {"a": np.zeros(1000, np.uint8)})

    ahead = Prefetcher(make, 3500, list)
    assert not made  # nothing before the first `next`
    for number in range(20):
        assert ahead.next().meta["number"] == number
        deadline = time.monotonic() + 10
        while len(made) < number + 5 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.005)
        assert len(made) == number + 5  # four of them wait: the last was begun at 3,000 bytes
    ahead.close()


def test_a_batch_larger_than_the_bound_still_passes() -> None:
    ahead = Prefetcher(lambda: Frame({}, {"a": np.zeros(1000, np.uint8)}), 1, list)
    assert all(ahead.next().nbytes == 1000 for _ in range(5))
    ahead.close()


def test_waiting_is_said_with_what_is_being_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prefetch, "_SAY_AFTER", 1.0)
    released = threading.Event()

    def make() -> Frame:
        assert released.wait(30)
        return Frame({})

    ahead = Prefetcher(make, 10, lambda: ["s3://bucket/shard-7, for 12 s"])
    threading.Timer(1.6, released.set).start()
    ahead.next()
    ahead.close()
    said = capsys.readouterr().err
    assert "batches are used up, and no new one came for 1 s; reading: s3://bucket/shard-7, for 12 s" in said


def test_an_error_is_the_consumers() -> None:
    def make() -> Frame:
        raise OSError("gone")

    ahead = Prefetcher(make, 10, list)
    with pytest.raises(OSError, match="gone"):
        ahead.next()
    ahead.close()
