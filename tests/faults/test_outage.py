"""Services that are down: training goes on to the same losses, and the outage is told.

No name is resolved, wandb's server is silent, the store of checkpoints or of data is away.
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace.engine.checkpoint.read import Checkpoint, list_checkpoints
from tests.data.stores.conftest import (  # noqa: F401
    FaultyServer,
    bucket,
    moto_url,
    own_environment,
    serve,
    server,
)
from tests.faults.conftest import Run, Runs

STEPS = ("train.duration=9 steps", "checkpoint.every=3 steps")
UPLOAD = "checkpoint.upload=s3://mill/run"
IMPATIENT = {"kind": "impatient", "seconds": 1.0}
MORE = 60.0  # seconds that an outage may add to a start
SECRET = "the-secret-of-the-miller"


@pytest.fixture(scope="module")
def twin(config_file: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Runs(config_file, tmp_path_factory.mktemp("twin"))("twin", [], *STEPS)
    assert run.codes == [0, 0], run.said
    return run


def started(run: Run) -> float:
    """Seconds until the end of the first step."""
    return float(run.events("step")[0]["time"] - run.events("start")[0]["began"])


def said(run: Run) -> str:
    return " ".join(" ".join(run.said).split())


def check_equal(run: Run, twin: Run) -> None:
    assert run.codes == [0, 0], run.said
    assert run.losses() == twin.losses()
    assert started(run) < started(twin) + MORE
    assert SECRET not in said(run) + (run.path / "ledger.jsonl").read_text()


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make an endpoint that of S3."""

    def use(url: str) -> None:
        values = {"ENDPOINT_URL": url, "ALLOW_HTTP": "true", "ACCESS_KEY_ID": SECRET, "SECRET_ACCESS_KEY": SECRET}
        for name, value in values.items():
            monkeypatch.setenv(f"AWS_{name}", value)

    return use


REFUSED = "http://127.0.0.1:9"  # the port of a service that nobody has


@pytest.mark.parametrize("how", ["refused", *(pytest.param(how, marks=pytest.mark.slow) for how in ("500", "silent"))])
def test_the_store_of_checkpoints_is_down(
    runs: Any, twin: Run, how: str, silent: str, store: Any, server: FaultyServer  # noqa: F811
) -> None:  # fmt: skip
    server.fault = lambda number, path: "500"
    store({"refused": REFUSED, "silent": silent}.get(how, server.url))
    run = runs("run", [IMPATIENT], *STEPS, UPLOAD)
    check_equal(run, twin)
    assert "s3://mill/run cannot be asked whether it holds checkpoints of this run" in said(run)
    tried = run.events("upload")
    assert tried[-1]["step"] == 9 and {u["step"] for u in tried} <= {3, 6, 9} and all(u["why"] for u in tried)
    for step in (u["step"] for u in tried):
        assert f"the checkpoint of step {step} is not in s3://mill/run/step-{step:08d}: " in said(run)


@pytest.mark.slow
def test_the_store_of_checkpoints_never_answers_and_nobody_is_impatient(
    runs: Any, twin: Run, silent: str, store: Any
) -> None:
    store(silent)
    began = time.monotonic()
    run = runs("run", [], *STEPS, UPLOAD)
    check_equal(run, twin)
    assert run.events("upload")[-1]["step"] == 9 and time.monotonic() - began < 200


@pytest.mark.slow
def test_what_was_not_uploaded_is_by_the_next_start_and_leads_back(
    runs: Any, twin: Run, store: Any, moto_url: str, bucket: Any  # noqa: F811
) -> None:  # fmt: skip
    store(REFUSED)
    run = runs("run", [IMPATIENT], *STEPS, UPLOAD)
    assert run.events("upload")[-1]["why"]
    store(moto_url)
    again = runs("run", [], *STEPS, UPLOAD)
    assert again.codes == [0, 0] and (again.events("upload")[-1]["step"], "why" in again.events("upload")[-1]) == (
        9,
        False,
    )
    shutil.move(run.path, run.path.with_name("lost"))
    back = runs("run", [], *STEPS, UPLOAD, "train.duration=12 steps")
    assert back.codes == [0, 0], back.said
    assert "step-00000009 of this run is downloaded from s3://mill/run" in said(back)
    further = runs("lost", [], *STEPS, "train.duration=12 steps")
    assert further.codes == [0, 0] and min(back.losses()) == 10
    assert {s: further.losses()[s] for s in (10, 11, 12)} == back.losses()
    mine, other = (Checkpoint(list_checkpoints(r.path / "checkpoints")[0]) for r in (back, further))
    assert mine.step == other.step == 12 and mine.digest() == other.digest()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["silent", "refused"])
def test_wandb_is_down(runs: Any, twin: Run, how: str, silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", silent if how == "silent" else REFUSED)
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    began = time.monotonic()
    run = runs("run", [], *STEPS, "track.wandb=online")
    check_equal(run, twin)
    end = run.events("end")[0]
    assert "wandb cannot be reached" in said(run) and "recording offline" in said(run)
    assert time.monotonic() - began - (end["time"] - run.events("start")[0]["began"]) < 40, "it does not linger"


@pytest.fixture
def nameless(tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """A command for which no name server answers, and no name but localhost is known without one."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.53\n")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    mounts = " && ".join(f"mount --bind {tmp_path}/{name} /etc/{name}" for name in ("resolv.conf", "hosts"))
    inside = ("unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as hole:
        try:
            hole.bind(("127.0.0.53", 53))
            subprocess.run([*inside, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"the name server cannot be taken away here: {error}")
        yield inside


@pytest.mark.slow
def test_no_name_is_resolved(
    runs: Any, twin: Run, nameless: tuple[str, ...], store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.test")
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    store("https://store.test")
    run = runs("run", [], *STEPS, UPLOAD, "track.wandb=online", inside=nameless)
    check_equal(run, twin)
    assert "s3://mill/run cannot be asked" in said(run) and "wandb cannot be reached" in said(run)
    assert run.events("upload")[-1]["step"] == 9 and run.events("upload")[-1]["why"]


@pytest.fixture
def remote_data(server: FaultyServer, tmp_path: Path, store: Any) -> str:  # noqa: F811
    """Twelve shards on a server, read without a cache; the override that trains on them."""
    from millrace.data.prepare import PrepareConfig, prepare

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(200)]
    for shard in range(12):
        lines = [json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(1, 120)))}) for _ in range(25)]
        server.files[f"/mill/{shard}.jsonl"] = "\n".join(lines).encode()
    store(server.url)
    urls = [f"s3://mill/{shard}.jsonl" for shard in range(12)]
    prepare(PrepareConfig(inputs=urls, out=str(tmp_path / "manifest"), vocab_size=320))
    return f"data.manifest={tmp_path}/manifest"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["503", "reset", "stall"])
def test_the_store_of_data_is_away_for_a_while(
    runs: Any, remote_data: str, server: FaultyServer, what: str, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setenv("MILLRACE_CACHE_SIZE", "0")
    clean = runs("clean", [], *STEPS, remote_data)
    assert clean.codes == [0, 0], clean.said
    first, lock, away = len(server.log) + 8, threading.Lock(), [0.0, 0]

    def fault(number: int, path: str) -> str:
        with lock:
            if number < first:
                return ""
            away[0] = away[0] or time.monotonic()
            down = time.monotonic() - away[0] < 8
            away[1] += down
            return what if down else ""

    server.fault = fault
    run = runs("run", [], *STEPS, remote_data)
    assert run.codes == [0, 0], run.said
    assert run.losses() == clean.losses() and away[1] > 0, "it was away"


@pytest.mark.slow
def test_the_store_of_data_does_not_come_back(
    runs: Any, remote_data: str, server: FaultyServer, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setenv("MILLRACE_CACHE_SIZE", "0")
    first = len(server.log) + 8
    server.fault = lambda number, path: "" if number < first else "503"
    run = runs("run", [IMPATIENT | {"seconds": 3.0}], *STEPS, remote_data)
    assert run.codes == [1, 1], run.said
    assert "cannot read s3://mill/" in said(run) and "503" in said(run) and "Traceback" not in said(run)
    server.fault = lambda number, path: ""
    assert runs("run", [], *STEPS, remote_data).codes == [0, 0]
