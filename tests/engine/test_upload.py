"""Checkpoints in an object store: complete or not there, back to the last bit, and no trouble for who uploads."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace.core.errors import UserError
from millrace.core.rundir import RunDir
from millrace.data.stores.folder import RemoteFolder, check_url
from millrace.data.stores.waiting import Patience
from millrace.engine.checkpoint import download as downloading
from millrace.engine.checkpoint.download import download, newest_remote, open_remote, remote_names, restore
from millrace.engine.checkpoint.read import Checkpoint, list_checkpoints, verdict
from millrace.engine.checkpoint.retention import prune
from millrace.engine.checkpoint.upload import Uploaded, Uploader
from millrace.engine.config import CheckpointConfig
from tests.data.stores.conftest import (  # noqa: F401
    FaultyServer,
    bucket,
    moto_url,
    own_environment,
    serve,
    server,
)
from tests.handmade import small_model, write_checkpoint
from tests.ranks import ROOT

QUICK = Patience(stall=0.4, deadline=1.0)
FINGERPRINT = {"seed": 3, "batch": 8}


@pytest.fixture
def store(bucket: Any) -> str:  # noqa: F811
    return "s3://mill/some/run"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with checkpoints of steps 1 and 2."""
    made = RunDir(tmp_path / "tiny")
    for step in (1, 2):
        write_checkpoint(made.checkpoints, small_model(seed=step), step=step)
    made.create(FINGERPRINT)
    return made


def path_of(run: RunDir, step: int) -> Path:
    return run.checkpoints / f"step-{step:08d}"


def upload(run: RunDir, url: str, *steps: int) -> list[Uploaded]:
    """Upload checkpoints one after the other; what was told of each."""
    uploader, told = Uploader(url, run, QUICK), []
    for step in steps:
        uploader.offer(path_of(run, step))
        until = time.monotonic() + 60
        while uploader.steps:
            assert time.monotonic() < until
            time.sleep(0.01)
        told += uploader.told()
    return told


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_up_and_down_again(run: RunDir, store: str, tmp_path: Path) -> None:
    one, two = upload(run, store + "/", 1, 2)
    assert (one.step, two.step, one.why, two.why) == (1, 2, "", "")
    assert two.to == f"{store}/step-00000002"
    assert two.bytes == sum(len(data) for data in files_of(path_of(run, 2)).values())
    found = newest_remote(RemoteFolder(store))
    assert found is not None and found.name == "step-00000002"
    back = download(found, tmp_path / "elsewhere")
    assert back.name == found.name and files_of(back) == files_of(path_of(run, 2)) and not verdict(back)
    assert Checkpoint(back).digest() == Checkpoint(path_of(run, 2)).digest()
    with pytest.raises(UserError, match="is there already"):
        download(found, tmp_path / "elsewhere")
    assert upload(run, store, 2) == [], "it is there already"


def test_a_file_of_many_parts(store: str, tmp_path: Path) -> None:
    data = os.urandom(20_000_001)  # three parts up, two reads down
    (tmp_path / "large").write_bytes(data)
    folder = RemoteFolder(store)
    folder.put("large", tmp_path / "large")
    with folder.blob("large") as blob:
        assert b"".join(blob.read(at, min(2**22, blob.size - at)) for at in range(0, blob.size, 2**22)) == data


def test_the_disk_is_a_store_too(run: RunDir, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    assert remote_names(RemoteFolder(url)) == []
    upload(run, url, 2)
    assert files_of(tmp_path / "store" / "step-00000002") == files_of(path_of(run, 2))
    assert remote_names(RemoteFolder(url)) == ["step-00000002"]


def test_a_step_is_complete_only_with_the_last_file(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write of an upload fails once; what is there then is no checkpoint, and the next attempt mends it."""
    put, count = RemoteFolder.put, len(files_of(path_of(run, 1))) + 1  # and the run's name
    for last in range(count):
        written: list[str] = []

        def broken(self: Any, name: str, source: Any, last: int = last, written: list[str] = written) -> None:
            if len(written) == last:
                raise OSError("the line was cut")
            put(self, name, source)
            written.append(name)

        url = f"file://{tmp_path}/store-{last}"
        monkeypatch.setattr(RemoteFolder, "put", broken)
        (told,) = upload(run, url, 1)
        assert told.why == "the line was cut" and newest_remote(RemoteFolder(url)) is None
        monkeypatch.setattr(RemoteFolder, "put", put)
        (told,) = upload(run, url, 1)
        assert not told.why and newest_remote(RemoteFolder(url)) is not None
    assert written[0] == "run.json" and len(written) == count - 1


KILLED = """
import os, signal, sys, time
from pathlib import Path
from millrace.core.rundir import RunDir
from millrace.data.stores.folder import RemoteFolder
from millrace.engine.checkpoint.upload import Uploader
put, run = RemoteFolder.put, RunDir(sys.argv[1])
def killed(self, name, source):
    if "rank-00001.safetensors" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, name, source)
RemoteFolder.put = killed
Uploader(sys.argv[2], run).offer(run.checkpoints / "step-00000002")
time.sleep(60)
"""


def test_a_killed_upload_leaves_no_checkpoint(run: RunDir, store: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(run.path), store], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    folder = RemoteFolder(store)
    assert remote_names(folder) == ["step-00000002"] and newest_remote(folder) is None
    (told,) = upload(run, store, 2)
    assert not told.why and newest_remote(folder) is not None


def test_a_step_that_was_computed_again_takes_the_place_of_the_old(run: RunDir, store: str, tmp_path: Path) -> None:
    upload(run, store, 2)
    again = RunDir(tmp_path / "again")
    write_checkpoint(again.checkpoints, small_model(seed=9), step=2)
    again.create(FINGERPRINT, None, json.loads(run.identity.read_text())["id"])
    (told,) = upload(again, store, 2)
    found = newest_remote(RemoteFolder(store))
    assert not told.why and found is not None
    assert files_of(download(found, tmp_path / "back")) == files_of(path_of(again, 2)) != files_of(path_of(run, 2))


def test_what_only_bridges_the_time_to_the_next_stays_here(run: RunDir, store: str) -> None:
    trainer = path_of(run, 2) / "trainer.json"
    trainer.write_text(json.dumps(json.loads(trainer.read_text()) | {"ephemeral": True}))
    assert upload(run, store, 2) == [] and remote_names(RemoteFolder(store)) == []


def test_one_at_a_time_and_what_is_read_is_not_removed(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (3, 4):
        write_checkpoint(run.checkpoints, small_model(), step=step)
    go, put = threading.Event(), RemoteFolder.put
    monkeypatch.setattr(RemoteFolder, "put", lambda *arguments: go.wait(60) and put(*arguments))
    uploader = Uploader(f"file://{tmp_path}/store", run, QUICK)
    uploader.offer(path_of(run, 1))
    while uploader._now is None:
        time.sleep(0.01)
    for step in (2, 3):
        uploader.offer(path_of(run, step))
    assert uploader.steps == {1, 3}
    prune(run.checkpoints, CheckpointConfig(keep=1), uploader.steps)
    assert [path.name[-1] for path in list_checkpoints(run.checkpoints)] == ["4", "3", "1"]
    go.set()
    while uploader.steps:
        time.sleep(0.01)
    assert [(u.step, bool(u.why)) for u in uploader.told()] == [(2, True), (1, False), (3, False)]


def test_another_runs_checkpoints_are_not_touched(run: RunDir, store: str, tmp_path: Path) -> None:
    upload(run, store, 1)
    other = RunDir(tmp_path / "other")
    write_checkpoint(other.checkpoints, small_model(), step=2)
    other.create(FINGERPRINT)
    (told,) = upload(other, store, 2)
    assert f"{store} holds the checkpoints of another run ('tiny'" in told.why and "checkpoint.upload" in told.why
    assert remote_names(RemoteFolder(store)) == ["step-00000001"]


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An endpoint that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


SECRETS = ("the-secret-of-the-miller", "c2lnbmF0dXJl")


@pytest.mark.parametrize("scheme", ["s3", "az"])
@pytest.mark.parametrize("fault", ["500", "403", "hangs", "refused"])
def test_a_store_that_fails_is_told_without_its_secrets(
    run: RunDir, fault: str, scheme: str, silent: str, server: FaultyServer, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    server.fault = lambda number, path: fault
    url = {"hangs": silent, "refused": "http://127.0.0.1:9"}.get(fault, server.url)
    environment = {
        "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": SECRETS[0], "AWS_SECRET_ACCESS_KEY": SECRETS[0],
        "AZURE_STORAGE_ENDPOINT": url, "AZURE_ALLOW_HTTP": "true", "AZURE_STORAGE_ACCOUNT_NAME": "miller",
        "AZURE_STORAGE_SAS_KEY": f"sv=2024&sig={SECRETS[1]}",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    (told,) = upload(run, f"{scheme}://mill/x", 2)
    assert told.why and told.step == 2 and time.monotonic() - began < 10
    assert f"{scheme}://mill/x" in told.why and not any(secret in told.why for secret in SECRETS), told.why
    if (fault, scheme) == ("500", "az"):
        assert any(SECRETS[1] in path for _, path, _ in server.log), "it does travel in URLs"


BAD_NAMES = [
    "../x",
    "/tmp/x",
    "a/../../x",
    "..",
    ".",
    "",
    "a//b",
    "./a",
    "a/",
    "MANIFEST.json",
    "a\0b",
    "a\nb",
    "\x1b[2J",
]
GOOD = {"size": 1, "sha256": "0" * 64}
BAD_MANIFESTS: dict[str, Any] = {
    **{f"name {name!r}": {"step": 7, "files": {name: GOOD}} for name in BAD_NAMES},
    "size below 0": {"step": 7, "files": {"a": GOOD | {"size": -1}}},
    "size in words": {"step": 7, "files": {"a": GOOD | {"size": "1"}}},
    "no hash": {"step": 7, "files": {"a": {"size": 1}}},
    "hash of another length": {"step": 7, "files": {"a": GOOD | {"sha256": "0" * 63}}},
    "another step": {"step": 8, "files": {"a": GOOD}},
    "no files": {"step": 7},
    "files in a list": {"step": 7, "files": ["a"]},
    "a list": [1],
    "a number": 7,
}


@pytest.mark.parametrize("name", [*BAD_MANIFESTS, "no JSON", "a thousand levels"])
def test_hostile_manifests_are_refused(name: str, tmp_path: Path) -> None:
    raw = {"no JSON": "{", "a thousand levels": "[" * 100_000}.get(name) or json.dumps(BAD_MANIFESTS[name])
    there = tmp_path / "store" / "step-00000007"
    there.mkdir(parents=True)
    (there / "MANIFEST.json").write_text(raw)
    (there / "a").write_text("x")
    with pytest.raises(UserError, match="is no manifest of a checkpoint"):
        open_remote(RemoteFolder(f"file://{tmp_path}/store"), "step-00000007")


@pytest.mark.parametrize("how", ["altered", "longer", "missing"])
def test_what_differs_from_the_manifest_does_not_become_visible(run: RunDir, tmp_path: Path, how: str) -> None:
    url = f"file://{tmp_path}/store"
    upload(run, url, 2)
    file = tmp_path / "store" / "step-00000002" / "rank-00001.safetensors"
    raw = file.read_bytes()
    file.write_bytes({"altered": raw[:-1] + bytes([raw[-1] ^ 1]), "longer": raw + b"x", "missing": b""}[how])
    if how == "missing":
        file.unlink()
    found = newest_remote(RemoteFolder(url))
    assert found is not None
    with pytest.raises((UserError, OSError), match="rank-00001.safetensors"):
        download(found, tmp_path / "back")
    assert list((tmp_path / "back").iterdir()) == []


def test_a_run_without_checkpoints_goes_on_from_its_own(run: RunDir, store: str, tmp_path: Path) -> None:
    lost = RunDir(tmp_path / "lost" / "tiny")
    lost.path.mkdir(parents=True)
    restore("", lost, FINGERPRINT)
    restore(store, lost, FINGERPRINT)
    assert not lost.started and not lost.identity.exists(), "nothing in the store: a new run"
    upload(run, store, 1, 2)
    restore(store, lost, FINGERPRINT)
    assert [path.name for path in list_checkpoints(lost.checkpoints)] == ["step-00000002"]
    assert lost.claim(FINGERPRINT) == json.loads(run.identity.read_text())["id"]
    restore("s3://not/asked", lost, FINGERPRINT)  # it has one


@pytest.mark.parametrize(
    "name, mine, why", [("try2", FINGERPRINT, "of run 'tiny'"), ("tiny", {"seed": 4}, "batch, seed")]
)
def test_a_run_does_not_go_on_from_anothers(
    run: RunDir, tmp_path: Path, name: str, mine: dict[str, Any], why: str
) -> None:
    url = f"file://{tmp_path}/store"
    upload(run, url, 2)
    other = RunDir(tmp_path / "new" / name)
    with pytest.raises(UserError) as caught:
        restore(url, other, mine)
    assert why in str(caught.value) and f"millrace checkpoint download {url} {other.checkpoints}" in str(caught.value)
    assert "set checkpoint.upload to another prefix" in str(caught.value) and not other.path.exists()


def test_checkpoints_that_cannot_be_taken_end_a_start(run: RunDir, tmp_path: Path) -> None:
    url, lost = f"file://{tmp_path}/store", RunDir(tmp_path / "lost" / "tiny")
    upload(run, url, 2)
    (tmp_path / "store" / "step-00000002" / "trainer.json").write_text("{}")
    lost.path.mkdir(parents=True)
    with pytest.raises(UserError, match="trainer.json has 2 bytes.*to start over"):
        restore(url, lost, FINGERPRINT)
    assert list_checkpoints(lost.checkpoints) == []


def test_a_store_that_is_silent_is_told_and_not_waited_for(
    silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for name, value in {"ENDPOINT_URL": silent, "ALLOW_HTTP": "true", "SKIP_SIGNATURE": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(downloading, "warn", said.append)
    monkeypatch.setattr(downloading, "_ASK_SECONDS", 0.5)
    began = time.monotonic()
    restore("s3://mill/x", RunDir(tmp_path / "run"), FINGERPRINT)
    assert time.monotonic() - began < 3
    assert said == ["s3://mill/x cannot be asked whether it holds checkpoints of this run (no answer within 0 s): "
                    "it starts from step 0"]  # fmt: skip


GOOD_URLS = ["s3://bucket", "s3://bucket/", "gs://b/a/b/", "az://container/x", "file:///tmp/x"]
BAD_URLS = ["bucket/x", "/tmp/x", "http://host/x", "hf://a/b", "s3://", "s3:///x", "file://x", "file:///",
            "s3://key:secret@bucket/x", "s3://b/x?sig=y", "s3://b/../x", "s3://b/a//b", "s3://b/a b"]  # fmt: skip


@pytest.mark.parametrize("url", GOOD_URLS + BAD_URLS)
def test_urls(url: str) -> None:
    assert (check_url(url) == "") == (url in GOOD_URLS)
    if url in BAD_URLS:
        with pytest.raises(UserError, match="checkpoint.upload = "):
            CheckpointConfig(upload=url)
