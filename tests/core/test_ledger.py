"""The ledger keeps every record that was appended, whatever cuts the writer off."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.core import ledger
from millrace.core.errors import UserError
from millrace.core.ledger import Ledger, consumed, effective, last_event, read, read_event


def write(path: Path, *events: str) -> None:
    with Ledger(path) as book:
        for number, event in enumerate(events):
            book.append(event, step=number)


def steps(*numbers: int) -> list[dict]:
    return [{"event": "step", "step": number, "nth": nth} for nth, number in enumerate(numbers)]


def test_a_record_has_event_time_and_fields(tmp_path: Path) -> None:
    before = time.time()
    with Ledger(tmp_path / "new" / "ledger.jsonl") as book:
        book.append("step", step=3, loss=0.1, data={"from": [1, 2]}, resumed_from=None)
    [record] = read(tmp_path / "new" / "ledger.jsonl")
    assert before <= record.pop("time") <= time.time()
    assert record == {"event": "step", "step": 3, "loss": 0.1, "data": {"from": [1, 2]}, "resumed_from": None}


def test_scalars_of_numpy_and_torch(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as book:
        book.append(
            "step",
            a=np.int64(7),
            b=np.float32(0.5),
            c=torch.tensor(2.5),
            d=torch.tensor([3]),
            e=np.bool_(True),
        )
    [record] = read(tmp_path / "l")
    assert [record[k] for k in "abcde"] == [7, 0.5, 2.5, 3, True]
    assert [type(record[k]) for k in "abcde"] == [int, float, float, int, bool]


def test_what_json_cannot_hold_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as book:
        for value in (torch.zeros(2), object(), np.zeros(3)):
            with pytest.raises(TypeError, match="cannot hold grad"):
                book.append("step", grad=value)
    assert (tmp_path / "l").read_bytes() == b""


def test_non_finite_floats_are_valid_json_and_come_back(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as book:
        book.append("step", a=math.nan, b=math.inf, c=np.float32(-math.inf), d=torch.tensor(math.nan), e=[math.inf])
    raw = json.loads((tmp_path / "l").read_text())
    assert [raw[k] for k in "abcde"] == ["nan", "inf", "-inf", "nan", ["inf"]]
    [record] = read(tmp_path / "l")
    assert math.isnan(record["a"]) and math.isnan(record["d"])
    assert [record[k] for k in "bce"] == [math.inf, -math.inf, [math.inf]]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(["nan", "inf", "-inf", "=nan", "==inf", " #torn"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=4))
def test_any_value_comes_back_equal(tmp_path_factory: pytest.TempPathFactory, values: list) -> None:
    path = tmp_path_factory.mktemp("ledger") / "l"
    with Ledger(path) as book:
        for value in values:
            book.append("any", value=value)
    assert [record["value"] for record in read(path)] == values


def test_a_file_cut_at_any_byte_loses_only_the_last_record(tmp_path: Path) -> None:
    path = tmp_path / "l"
    write(path, "a", "b")
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("}")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        intact = ["a", "b"][: sum(size > end for end in ends)]
        assert [r["event"] for r in read(path)] == intact
        write(path, "after")
        write(path, "later")
        assert [r["event"] for r in read(path)] == [*intact, "after", "later"], f"cut at {size}"


def test_a_torn_line_longer_than_a_block_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "l"
    write(path, "a")
    with open(path, "ab") as file:
        file.write(b'{"event":"sample","text":"' + b"x" * 200_000)
    write(path, "after")
    assert [r["event"] for r in read(path)] == ["a", "after"]
    assert path.read_bytes().count(b"\n") == 3


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "l"
    write(path, "a", "b", "c")
    lines = path.read_bytes().split(b"\n")
    for broken in (b"\x00\x00", lines[1][:-1], b"123", b"{}"):
        path.write_bytes(b"\n".join([lines[0], broken, *lines[2:]]))
        with pytest.raises(UserError, match=rf"{path}:2 is damaged .*repair or delete"):
            read(path)


def test_missing_ledger(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the ledger .*absent"):
        read(tmp_path / "absent")


def test_unwritable_ledger(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot open the ledger"):
        Ledger(tmp_path)


def test_full_disk_says_how_to_mend_and_the_next_record_is_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "l"
    book = Ledger(path)
    book.append("before")
    real = os.write

    def fills_up(fd: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: len(data) // 2])

    monkeypatch.setattr(ledger.os, "write", fills_up)
    with pytest.raises(UserError, match="No space left.*free space"):
        book.append("lost", text="x" * 100)
    monkeypatch.setattr(ledger.os, "write", real)
    book.append("after")
    assert [r["event"] for r in read(path)] == ["before", "after"]


def test_fsync_is_called_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(ledger.os, "fsync", synced.append)
    with Ledger(tmp_path / "l") as book:
        book.append("step", step=1)
        assert synced == []
        book.append("checkpoint", step=1, fsync=True)
        assert len(synced) == 1
    assert "fsync" not in read(tmp_path / "l")[1]


def test_a_killed_writer_loses_nothing_that_it_appended(tmp_path: Path) -> None:
    path = tmp_path / "l"
    code = (
        "import sys; from millrace.core.ledger import Ledger\n"
        f"book = Ledger({str(path)!r})\n"
        "for i in range(10**9):\n    book.append('step', step=i); print(i, flush=True)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(50):
        last = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    last = max([last, *map(int, writer.stdout.read().split())])
    writer.wait()
    got = [record["step"] for record in read(path)]
    assert got == list(range(len(got))) and len(got) > last


def test_two_writers_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "l"
    one, two = Ledger(path), Ledger(path)
    for number in range(20):
        one.append("a", step=number)
        two.append("b", step=number)
    assert [r["step"] for r in read(path) if r["event"] == "b"] == list(range(20))


def test_consumed_without_restart() -> None:
    got = consumed([{"event": "start", "resumed_from": None}, *steps(1, 2, 3)])
    assert [s["step"] for s in got.steps] == [1, 2, 3]
    assert (got.recomputed, got.restarts) == (0, [])


def test_consumed_takes_the_last_record_of_a_step() -> None:
    got = consumed(
        [
            {"event": "start", "resumed_from": None},
            *steps(1, 2, 3, 4),
            {"event": "start", "resumed_from": 2},
            {"event": "resume", "step": 2},
            *[s | {"nth": s["nth"] + 10} for s in steps(3, 4, 5)],
        ]
    )
    assert [(s["step"], s["nth"]) for s in got.steps] == [(1, 0), (2, 1), (3, 10), (4, 11), (5, 12)]
    assert (got.recomputed, got.restarts) == (2, [2])


def test_steps_after_the_last_return_are_not_part_of_the_run() -> None:
    got = consumed([{"event": "start"}, *steps(1, 2, 3, 4), {"event": "start", "resumed_from": 2}, *steps(3)])
    assert [s["step"] for s in got.steps] == [1, 2, 3]
    assert got.recomputed == 2


def test_restarts_count_starts_and_rollbacks_once() -> None:
    start = {"event": "start", "resumed_from": None}
    again, resume = {"event": "start", "resumed_from": 1}, {"event": "resume", "step": 1}
    for records, restarts in [
        ([start, *steps(1, 2), resume, again, *steps(2)], [1]),
        ([start, *steps(1, 2), again, resume, again, resume, *steps(2)], [1, 1]),
        ([start, *steps(1, 2), resume, *steps(2)], [1]),
        ([start, *steps(1), start, *steps(1)], [0]),
    ]:
        assert consumed(records).restarts == restarts


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=6))
def test_consumed_is_what_a_run_that_was_never_killed_records(segments: list[tuple[int, int]]) -> None:
    records: list[dict] = [{"event": "start", "resumed_from": None}]
    reached, computed = 0, 0
    for length, back in segments:
        records += steps(*range(reached + 1, reached + length + 1))
        reached, computed = max(0, reached + length - back), computed + length
        records.append({"event": "start", "resumed_from": reached})
    got = consumed(records)
    assert [s["step"] for s in got.steps] == list(range(1, reached + 1))
    assert got.recomputed == computed - reached
    assert len(got.restarts) == len(segments)


def test_effective_keeps_several_records_of_one_step_and_drops_undone_ones() -> None:
    sample = [{"event": "sample", "step": step, "prompt": prompt} for step in (2, 4) for prompt in "ab"]
    records = [
        {"event": "start"},
        *sample,
        {"event": "start", "resumed_from": 2},
        {"event": "resume", "step": 2},
    ]
    assert effective(records, "sample") == sample[:2]


def test_records_of_one_event_are_found_without_the_others(tmp_path: Path) -> None:
    with_others = Ledger(tmp_path / "ledger.jsonl")
    with_others.append("step", step=1, note="quarantine")
    with_others.append("quarantine", sample=3, why="gone", value=float("inf"))
    with_others.append("quarantine", sample=4, why="spoilt")
    with_others.close()
    with open(with_others.path, "ab") as file:
        file.write(b'{"event":"quarantine","sam')
    found = read_event(with_others.path, "quarantine")
    assert [(r["sample"], r["why"]) for r in found] == [(3, "gone"), (4, "spoilt")]
    assert found == [r for r in read(with_others.path) if r["event"] == "quarantine"]


def test_the_last_event_is_found_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert last_event(path, "step") is None
    with Ledger(path) as book:
        assert last_event(path, "step") is None
        for number in range(300):
            book.append("step", step=number, loss=math.inf, filler="x" * (40_000 if number % 97 == 0 else 50))
        assert last_event(path, "step")["step"] == 299  # type: ignore[index]
        for _ in range(40):
            book.append("note", text='"event":"step"', filler="y" * 60_000)  # further back than one block
        found = last_event(path, "step")
        assert found is not None and found["step"] == 299 and found["loss"] == math.inf
        assert last_event(path, "start") is None
    with open(path, "ab") as file:
        file.write(b'{"event":"step","st')  # a crash
    assert last_event(path, "step")["step"] == 299  # type: ignore[index]
