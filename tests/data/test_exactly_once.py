"""No sample lost or repeated: any world, any workers, any kill; the order is one and the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.data.builder import Opened, Spec
from millrace.data.config import DataConfig, MixtureConfig
from millrace.data.corpus import Corpus
from millrace.data.state import LoaderState
from millrace.data.stream import Deal, Share

ROWS = 240  # divided by most worlds up to 16
Consumed = list[tuple[int, int, int]]


@pytest.fixture(scope="module")
def folders(corpora: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two manifests with one tokenizer."""
    folder = tmp_path_factory.mktemp("once")
    first = corpora.prepare_documents(folder / "a", corpora.make_documents(70, seed=1), name="a")
    second = corpora.prepare_documents(
        folder / "b", corpora.make_documents(40, seed=2, longest=200), tokenizer=str(first / "tokenizer"), name="b"
    )
    return [str(first), str(second)]


def configure(folders: list[str], mixed: bool, **options: Any) -> DataConfig:
    names = [source.name for source in Corpus.load(folders).sources()]
    later = [{"at": "3 steps", "weights": dict(zip(names, (1, 3), strict=True))}]
    mixture = {"weights": dict(zip(names, (2.0, 1.0), strict=True)), "schedule": later} if mixed else {}
    return DataConfig(manifest=folders, sequence_length=16, mixture=MixtureConfig(**mixture), **options)


def frames(spec: Spec, workers: int, state: LoaderState) -> Iterator[tuple[Consumed, LoaderState]]:
    """One rank's frames, built by `workers` workers in turn as their processes would (0: by the rank itself)."""
    shares = [Share(n, max(workers, 1), state.steps) for n in range(max(workers, 1))]
    opened = Opened(spec, state)
    builders = [opened.builder(share) for share in shares]
    try:
        for made in zip(*(builder.steps(state) for builder in builders), strict=True):
            for frame, after in made:
                yield [tuple(s) for s in frame.arrays["row_spans"].tolist()], after
    finally:
        for builder in builders:
            builder.documents.close()


def consume(config: DataConfig, world: int, workers: int, state: LoaderState | None, steps: int) -> tuple[Any, Any]:
    """What all ranks of a world consumed in each of `steps` steps, and the state after them."""
    specs = [Spec(config=config, seed=9, deal=Deal(ROWS, ROWS // world, rank, world)) for rank in range(world)]
    first = Opened(specs[0], state).state
    ranks = [frames(spec, workers, first) for spec in specs]
    done, after = [], first
    for _ in range(steps):
        built = [next(rank) for rank in ranks]
        assert len({json.dumps(found.to_dict()) for _, found in built}) == 1
        done.append([span for spans, _ in built for span in spans])
        after = built[0][1]
    for rank in ranks:
        rank.close()
    return done, LoaderState.from_dict(json.loads(json.dumps(after.to_dict())))


def order(steps: list[Consumed]) -> str:
    return hashlib.sha256(np.array([s for step in steps for s in step], "<i8").tobytes()).hexdigest()


WORLDS = st.sampled_from([1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16])
SEGMENTS = st.lists(st.tuples(WORLDS, st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=5)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(segments=SEGMENTS, mixed=st.booleans(), pack=st.booleans(), window=st.sampled_from([7, 40, 200]))
def test_any_worlds_and_workers_consume_the_same_stream(
    folders: list[str], segments: list[tuple[int, int, int]], mixed: bool, pack: bool, window: int
) -> None:
    """Killed after each segment, resumed on other ranks and workers: the uninterrupted run's spans, in its order."""
    config = configure(folders, mixed, pack=pack, window=window, threads=1)
    seen: list[Consumed] = []
    state = None
    for world, workers, steps in segments:
        done, state = consume(config, world, workers, state, steps)
        seen += done
    whole, final = consume(config, 1, 0, None, len(seen))
    assert Counter(s for step in seen for s in step) == Counter(s for step in whole for s in step)
    assert order(seen) == order(whole) and state == final


def test_epochs_are_complete_whatever_the_worlds(folders: list[str]) -> None:
    """Three epochs on changing worlds: every target of every sample three times, but for the window under way."""
    config = configure(folders, mixed=False, window=110, threads=1)
    state, seen = None, Counter[tuple[int, int]]()
    for world in (16, 3, 8, 5, 1, 12) * 10:
        done, state = consume(config, world, 2, state, 1)
        before = Counter((s, at) for step in done for s, start, end in step for at in range(start, end))
        seen += before
        if state.window >= 3:
            break
    corpus = Corpus.load(folders)
    samples = np.array([(m << 40) + i for m, f in enumerate(corpus.manifests) for i in range(f.samples)])
    costs = corpus.entries(samples).tokens.tolist()
    whole = Counter({(s, at): 3 for s, cost in zip(samples.tolist(), costs, strict=True) for at in range(cost)})
    assert state.window == 3 and not whole - seen
    assert max(seen.values()) <= 4


def test_a_world_that_does_not_divide_the_batch_is_refused_with_those_that_would(folders: list[str]) -> None:
    config = configure(folders, mixed=False)
    with pytest.raises(UserError, match="dealt to 7 ranks in micro-batches of 40 rows; with these, 1, 2, 3, 6 ranks"):
        Opened(Spec(config=config, seed=9, deal=Deal(ROWS, 40, 0, 7)), None)


def run_until_killed(job: Path, out: Path, after: float, running: bool) -> bool:
    """Start the consumer and SIGKILL all of it after so many seconds; whether it had ended by itself.

    `running`: counted from the first step that it consumed, not from its start.
    """
    before = out.stat().st_size if out.exists() else 0
    process = subprocess.Popen([sys.executable, str(Path(__file__).parent / "consume.py"), str(job)])
    deadline = time.monotonic() + 120
    while running and process.poll() is None and not (out.exists() and out.stat().st_size > before):
        assert time.monotonic() < deadline, "no step in two minutes"
        time.sleep(0.01)
    try:
        process.wait(after)
        assert process.returncode == 0
        return True
    except subprocess.TimeoutExpired:
        workers = psutil.Process(process.pid).children(recursive=True)
        for one in (psutil.Process(process.pid), *workers):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(workers, timeout=10)
        assert not [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]
        return False


def survive(folders: list[str], tmp_path: Path, kills: int, steps: int) -> None:
    draw = random.Random(kills)
    names = [source.name for source in Corpus.load(folders).sources()]
    mixture = {"weights": dict(zip(names, (2.0, 1.0), strict=True))}
    config = {"manifest": folders, "sequence_length": 16, "window": 40, "mixture": mixture}
    out = tmp_path / "killed.jsonl"
    job = {
        "config": config,
        "rows": 48,
        "steps": steps,
        "out": str(out),
        "world": 1,
        "workers": 0,
    }
    killed = 0
    while killed < kills:
        job |= {"world": draw.choice([1, 2, 3, 4]), "workers": draw.choice([0, 1, 2])}
        (tmp_path / "job.json").write_text(json.dumps(job))
        running = draw.random() < 0.8
        if run_until_killed(tmp_path / "job.json", out, draw.uniform(0, 0.3 if running else 3.0), running):
            job["steps"] += steps
            continue
        killed += 1
    lines = (tmp_path / "killed.jsonl").read_text().split("\n")[:-1]
    whole = job | {"out": str(tmp_path / "whole.jsonl"), "world": 1, "workers": 0, "steps": len(lines)}
    (tmp_path / "job.json").write_text(json.dumps(whole))
    assert run_until_killed(tmp_path / "job.json", tmp_path / "whole.jsonl", 500, running=False)
    expected = (tmp_path / "whole.jsonl").read_text().split("\n")[:-1]
    assert len(lines) == len(expected) > 0
    assert lines == expected
    assert all(json.loads(line)["planned"] == json.loads(line)["built"] for line in lines)
    assert not [name for name in os.listdir("/dev/shm") if "millrace" in name]


def test_killed_at_random_moments(folders: list[str], tmp_path: Path) -> None:
    survive(folders, tmp_path, kills=4, steps=100_000)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_two_hundred_random_moments(folders: list[str], tmp_path: Path) -> None:
    began = time.monotonic()
    survive(folders, tmp_path, kills=200, steps=100_000)
    print(f"200 kills in {time.monotonic() - began:.0f} s")
