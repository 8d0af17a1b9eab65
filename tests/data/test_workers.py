"""Worker processes: the same stream as without them, whatever dies, and nothing left behind."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from millrace.core.errors import UserError
from millrace.data import workers as workers_module
from millrace.data.config import DataConfig
from millrace.data.frames import Frame, read_frame, write_frame
from millrace.data.loader import Loader, build_loader
from millrace.data.workers import Workers


def load(corpus: Path, workers: int, **more: Any) -> Loader:
    state, rank, world, micro = (more.pop(k, d) for k, d in (("state", None), ("rank", 0), ("world", 1), ("micro", 1)))
    values = {"sequence_length": 48, "window": 20, "threads": 2, "prefetch": 4096} | more
    config = DataConfig(manifest=str(corpus), workers=workers, **values)
    return build_loader(config, seed=3, batch_rows=6, micro_batch=micro, rank=rank, world=world, state=state)


def take(loader: Loader, count: int) -> list[Any]:
    return [next(loader) for _ in range(count)]


def same(a: Any, b: Any) -> bool:
    micro = zip(a.micro_batches, b.micro_batches, strict=True)
    tensors = ("input_ids_BT", "labels_BT", "position_ids_BT")
    return (
        all(torch.equal(getattr(x, n), getattr(y, n)) for x, y in micro for n in tensors)
        and [m.spans for m in a.micro_batches] == [m.spans for m in b.micro_batches]
        and (a.spans, a.state, a.local_tokens) == (b.spans, b.state, b.local_tokens)
    )


def children() -> list[psutil.Process]:
    """Worker processes of this one that live."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie for one
            if "millrace.data.worker" in process.cmdline():
                found.append(process)
    return found


ARRAYS = hnp.arrays(
    st.sampled_from([np.int32, np.int64, np.uint8, np.float32]), hnp.array_shapes(min_dims=0, min_side=0)
)


@given(st.dictionaries(st.text(), ARRAYS, max_size=4), st.dictionaries(st.text(), st.integers()))
def test_frames_come_out_as_they_went_in(arrays: dict[str, np.ndarray], meta: dict[str, int]) -> None:
    file = io.BytesIO()
    write_frame(file, Frame(meta, arrays))
    write_frame(file, Frame({"end": 1}))
    file.seek(0)
    found = read_frame(file)
    assert found is not None and found.meta == meta and found.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)
    assert read_frame(file) == Frame({"end": 1})
    assert read_frame(file) is None
    for cut in (1, 9, len(file.getvalue()) // 3):
        torn = io.BytesIO(file.getvalue()[:cut])
        while (frame := read_frame(torn)) is not None:
            assert frame.meta == meta


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 0), (2, 4096), (3, 10**6)])
def test_the_stream_does_not_depend_on_workers(corpus: Path, workers: int, prefetch: int) -> None:
    for rank in range(2):
        options = {"rank": rank, "world": 2, "prefetch": prefetch}
        with load(corpus, 0, **options) as inline, load(corpus, workers, **options) as loader:
            expected, found = take(inline, 25), take(loader, 25)
        assert all(same(a, b) for a, b in zip(expected, found, strict=True))
        with load(corpus, workers, state=expected[6].state, **options) as resumed:
            assert all(same(a, b) for a, b in zip(expected[7:], take(resumed, 18), strict=True))
    assert not children()


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers_module, "_PIPE_BYTES", 4096)  # a worker is at most a step ahead, and dies in frames
    with load(corpus, 0) as inline:
        expected = take(inline, 40)
    found = []
    with load(corpus, 2, prefetch=0) as loader:
        for number in range(40):
            found.append(next(loader))
            if number % 9 == 4:
                alive = children()
                alive[number % len(alive)].kill()
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    assert capfd.readouterr().err.count("a new one builds its steps") == 4
    assert not children()


def test_a_worker_that_cannot_live_ends_the_loader_with_its_code(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Workers._start

    def start(self: Workers, offset: int) -> subprocess.Popen[bytes]:
        process = honest(self, offset)
        process.kill()
        return process

    monkeypatch.setattr(Workers, "_start", start)
    with (
        load(corpus, 1) as loader,
        pytest.raises(UserError, match="a data worker ended with signal 9, 3 times .* lower data.workers"),
    ):
        next(loader)
    assert not children()


def test_an_error_in_a_worker_is_the_loaders(corpora: Any, tmp_path: Path) -> None:
    corpus = corpora.prepare_documents(tmp_path, corpora.make_documents(40))
    (tmp_path / "documents.jsonl").unlink()
    with (
        load(corpus, 2) as loader,
        pytest.raises(UserError, match=r"cannot read a shard .*documents.jsonl.*put it back"),
    ):
        next(loader)
    assert not children()


def test_excluded_samples_are_left_out_by_workers(corpus: Path) -> None:
    with load(corpus, 2) as loader:
        loader.exclude({7: "spoilt before"})
        batches = take(loader, 20)
    with load(corpus, 0) as inline:
        inline.exclude({7: "spoilt before"})
        expected = take(inline, 20)
    assert all(same(a, b) for a, b in zip(expected, batches, strict=True))
    assert any(s == 7 for b in batches for s, _, _ in b.spans) and not any(b.quarantined for b in batches)


def test_workers_import_no_torch_and_leave_no_shared_memory(corpus: Path) -> None:
    with load(corpus, 1) as loader:
        next(loader)
        (worker,) = children()
        maps = Path(f"/proc/{worker.pid}/maps").read_text()
        opened = []
        for fd in Path(f"/proc/{worker.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                opened.append(os.readlink(fd))
        assert "libtorch" not in maps
        assert not [name for name in (*maps.splitlines(), *opened) if "/dev/shm" in name]


def test_workers_end_when_their_rank_is_killed(corpus: Path) -> None:
    script = f"""
        import sys, time
        sys.path[:0] = {sys.path!r}
        from millrace.data.config import DataConfig
        from millrace.data.loader import build_loader
        config = DataConfig(manifest={str(corpus)!r}, sequence_length=48, workers=2)
        loader = build_loader(config, seed=3, batch_rows=6, micro_batch=1, rank=0, world=1)
        next(loader)
        print("ready", flush=True)
        time.sleep(60)
    """
    rank = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
    try:
        assert rank.stdout is not None and rank.stdout.readline() == b"ready\n"
        workers = psutil.Process(rank.pid).children()
        assert len(workers) == 2
    finally:
        rank.send_signal(signal.SIGKILL)
        rank.wait()
    deadline = time.monotonic() + 20
    while any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers):
        assert time.monotonic() < deadline, "workers outlive their rank"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_pinned_where_there_is_a_gpu(corpus: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    pinned: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(id(tensor))
        return tensor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    with load(corpus, workers) as loader:
        (first, *_) = next(loader).micro_batches
    assert {id(first.input_ids_BT), id(first.labels_BT), id(first.position_ids_BT)} <= set(pinned)
