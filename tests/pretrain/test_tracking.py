"""Tracking: the ledger is complete whatever wandb does, and wandb never holds a run up."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.core.config import build
from millrace.core.errors import UserError
from millrace.core.ledger import read
from millrace.core.rundir import RunDir
from millrace.pretrain import tracking
from millrace.pretrain.track_config import TrackConfig
from millrace.pretrain.tracking import Tracker

KEY = "f" * 40


class FakeWandb(types.ModuleType):
    """Stands in for wandb: records what it is given, and fails or hangs where `bad[name]` says so."""

    def __init__(self, **bad: Any) -> None:
        super().__init__("wandb")
        self.bad = bad
        self.inits: list[dict[str, Any]] = []
        self.points: list[dict[str, Any]] = []
        self.finished = self.torn_down = 0
        self.url = "https://example.invalid/run"
        self.release = threading.Event()

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def _do(self, name: str) -> None:
        what = self.bad.get(name)
        if what == "hang":
            self.release.wait(60)
        elif what is not None:
            raise what

    def init(self, **arguments: Any) -> FakeWandb:
        self.inits.append(arguments)
        self._do(f"init_{arguments['mode']}")
        return self

    def teardown(self) -> None:
        self.torn_down += 1

    def define_metric(self, *arguments: Any, **named: Any) -> None:
        pass

    def log(self, point: dict[str, Any]) -> None:
        self._do("log")
        self.points.append(point)

    def finish(self) -> None:
        self._do("finish")
        self.finished += 1


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    RunDir(tmp_path / "run").claim({"seed": 1})
    return tmp_path / "run"


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(tracking, "warn", found.append)
    monkeypatch.setattr(tracking, "say", lambda text: None)
    monkeypatch.setattr(tracking, "_INIT_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "_FINISH_SECONDS", 4.0)
    monkeypatch.setattr(tracking, "_probe", lambda: None)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    return found


def use(monkeypatch: pytest.MonkeyPatch, fake: FakeWandb) -> FakeWandb:
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def train(run_dir: Path, mode: str, steps: int = 20, **config: Any) -> float:
    """A run of `steps` steps; returns the longest time that one `log` took."""
    longest = 0.0
    with Tracker(TrackConfig(wandb=mode, **config), run_dir, {"model": {"kind": "qwen3"}}) as tracker:  # type: ignore[arg-type]
        tracker.log("start", world=1)
        for step in range(1, steps + 1):
            began = time.perf_counter()
            tracker.log("step", step=step, loss=torch.tensor(2.0), data={"sha": "x", "from": [0, 0]})
            longest = max(longest, time.perf_counter() - began)
        tracker.log("eval", step=steps, loss=2.5, bpb=1.0)
        tracker.log("end", step=steps, outcome=0, why="done")
    return longest


def assert_complete(run_dir: Path, steps: int = 20) -> None:
    records = read(run_dir / "ledger.jsonl")
    assert [r["event"] for r in records] == ["start", *["step"] * steps, "eval", "end"]
    assert [r["step"] for r in records if r["event"] == "step"] == list(range(1, steps + 1))


def test_disabled_writes_the_ledger_and_nothing_of_wandb(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, FakeWandb())
    train(run_dir, "disabled")
    assert_complete(run_dir)
    assert not (run_dir / "wandb").exists() and fake.inits == []


def test_other_ranks_write_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, FakeWandb())
    with Tracker(TrackConfig(wandb="online"), run_dir, {}, enabled=False) as tracker:
        tracker.log("step", step=1)
    assert not (run_dir / "ledger.jsonl").exists() and fake.inits == []


def test_important_events_are_on_the_disk(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with Tracker(TrackConfig(), run_dir, {}) as tracker:
        for event, expected in [("start", 1), ("step", 1), ("checkpoint", 2), ("resume", 3), ("eval", 3), ("end", 4)]:
            tracker.log(event, step=1)
            assert len(synced) == expected, event


def test_wandb_gets_the_run_and_its_points(run_dir: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    fake = use(monkeypatch, FakeWandb())
    train(run_dir, "online", log_every=5, tags=["a"], project="p", entity="e")
    assert_complete(run_dir)
    [init] = fake.inits
    told = {k: init[k] for k in ("mode", "project", "entity", "tags", "config", "dir", "name", "resume")}
    assert told == {
        "mode": "online", "project": "p", "entity": "e", "tags": ["a"], "config": {"model": {"kind": "qwen3"}},
        "dir": str(run_dir), "name": "run", "resume": "allow",
    }  # fmt: skip
    losses = [p for p in fake.points if "step/loss" in p]
    assert [p["step"] for p in losses] == [5, 10, 15, 20]
    assert losses[0] == {"step": 5, "step/loss": 2.0}
    assert {"step": 20, "eval/loss": 2.5, "eval/bpb": 1.0} in fake.points
    assert fake.finished == 1 and warnings == []


def test_a_restarted_run_continues_the_same_wandb_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    fake = use(monkeypatch, FakeWandb())
    train(run_dir, "online")
    train(run_dir, "offline")
    ids = {init["id"] for init in fake.inits}
    assert ids == {RunDir(run_dir).claim({"seed": 1})}


def test_norms_and_samples_become_points() -> None:
    norms = {"step": 5, "grad": {"layers.0": 0.5}, "max_logit": torch.tensor(9.0)}
    assert tracking._point("norms", norms) == {"step": 5, "norms/grad/layers.0": 0.5, "norms/max_logit": 9.0}
    sample = {"step": 5, "prompt": "a", "text": "b"}
    assert tracking._point("sample", sample) == {"step": 5, "sample/prompt": "a", "sample/text": "b"}


BROKEN = {
    "init raises": ({"init_online": OSError("no route")}, ["online", "offline"], "cannot be reached .*no route"),
    "init hangs": ({"init_online": "hang"}, ["online", "offline"], "cannot be reached .*no answer within"),
    "init exits": ({"init_online": SystemExit(1)}, ["online", "offline"], "cannot be reached .*SystemExit"),
    "both raise": (
        {"init_online": OSError("a"), "init_offline": OSError("b")},
        ["online", "offline"],
        "does not start .*b",
    ),
    "both hang": ({"init_online": "hang", "init_offline": "hang"}, ["online", "offline"], "does not start"),
    "log raises": ({"log": RuntimeError("bad point")}, ["online"], "refused a record .*bad point"),
    "log hangs": ({"log": "hang"}, ["online"], "did not finish within"),
    "finish raises": ({"finish": RuntimeError("late")}, ["online"], "late"),
    "finish hangs": ({"finish": "hang"}, ["online"], "did not finish within"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_wandb_neither_stops_nor_slows_a_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str], name: str
) -> None:
    bad, modes, message = BROKEN[name]
    fake = use(monkeypatch, FakeWandb(**bad))
    began = time.perf_counter()
    longest = train(run_dir, "online")
    spent = time.perf_counter() - began
    fake.release.set()
    assert_complete(run_dir)
    assert longest < 1 and spent < 9
    assert [init["mode"] for init in fake.inits] == modes
    assert any(re.search(message, text) for text in warnings), warnings
    assert len(warnings) <= 2
    if modes == ["online", "offline"] and "init_offline" not in bad:
        assert len([p for p in fake.points if "step/loss" in p]) == 20 and len(warnings) == 1


def test_a_full_queue_drops_and_counts(run_dir: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    monkeypatch.setattr(tracking, "_QUEUE", 5)
    monkeypatch.setattr(tracking, "_FINISH_SECONDS", 0.3)
    fake = use(monkeypatch, FakeWandb(log="hang"))
    train(run_dir, "online", steps=50)
    fake.release.set()
    assert_complete(run_dir, 50)
    [missed] = [text for text in warnings if "missed" in text]
    assert int(missed.split()[2]) >= 45


def test_online_without_a_key_records_offline_and_never_asks(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    fake = use(monkeypatch, FakeWandb())
    train(run_dir, "online")
    assert [init["mode"] for init in fake.inits] == ["offline"]
    assert len(warnings) == 1 and "needs WANDB_API_KEY" in warnings[0]


def test_missing_wandb_is_one_warning(run_dir: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(run_dir, "offline")
    assert_complete(run_dir)
    assert len(warnings) == 1 and "does not start" in warnings[0]


CODE = """
import sys
from millrace.pretrain.track_config import TrackConfig
from millrace.pretrain.tracking import Tracker
with Tracker(TrackConfig(wandb=sys.argv[2]), sys.argv[1], {"model": {"kind": "qwen3"}}) as tracker:
    tracker.log("start", world=1)
    for step in range(1, 21):
        tracker.log("step", step=step, loss=2.0)
    tracker.log("eval", step=20, loss=2.5)
    tracker.log("end", step=20, outcome=0, why="done")
"""


def process(run_dir: Path, mode: str, **environment: str) -> tuple[float, str]:
    """A real process with the real wandb, seen from outside: (seconds until it is gone, what it said)."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and not k.lower().endswith("_proxy")}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(run_dir), mode],
        env=variables | {"HOME": str(run_dir.parent)} | environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - began, done.stdout + done.stderr


def test_real_offline_run_lies_in_the_run_directory(run_dir: Path) -> None:
    _, said = process(run_dir, "offline")
    assert_complete(run_dir)
    run_id = RunDir(run_dir).claim({"seed": 1})
    [data] = (run_dir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    assert b"step/loss" in data.read_bytes()
    assert said == ""


def assert_offline_copy_without_key(run_dir: Path) -> None:
    [data] = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    assert b"step/loss" in data.read_bytes()
    stored = [path for path in run_dir.parent.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert stored == [], "the key was written into a file"


def test_real_online_run_with_a_dead_network_ends_soon(run_dir: Path) -> None:
    seconds, said = process(run_dir, "online", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=KEY)
    assert_complete(run_dir)
    assert seconds < 10
    assert said.count("wandb cannot be reached") == 1 and "http://127.0.0.1:9: Connection refused" in said
    assert said.count("warning") == 1 and "Traceback" not in said
    assert_offline_copy_without_key(run_dir)


def test_real_online_run_whose_server_never_answers_ends_too(run_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        seconds, said = process(run_dir, "online", WANDB_BASE_URL=url, WANDB_API_KEY=KEY)
    assert_complete(run_dir)
    # On an idle machine the offline copy is complete after 9 s; a short run on a busy one does not wait for it.
    assert seconds < 25 and "wandb cannot be reached" in said and "Traceback" not in said, said


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"wandb": "onlin"}, "did you mean 'online'"),
        ({"log_every": 0}, "log_every = 0"),
        ({"norms_every": -1}, "norms_every = -1"),
        ({"wandb": "online", "project": ""}, "project is empty"),
    ],
)
def test_mistakes_in_the_section_are_named(section: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(TrackConfig, section, prefix="track.")
