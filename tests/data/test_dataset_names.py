"""What `datasets:NAME:CONFIG:SPLIT` may name: folders, files, globs, splits, and data sets of a hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest

from millrace.core.errors import UserError
from millrace.data.dataset_values import Inside
from millrace.data.prepare import PrepareConfig, prepare
from millrace.data.sources.base import BadSample
from tests.data.dataset_folders import COUNT, run, write_csv, write_folder, write_jsonl, write_parquet
from tests.data.local_hub import REPO, LocalHub

pytestmark = pytest.mark.usefixtures("alone")


def test_where_files_may_lie(tmp_path: Path) -> None:
    inside = Inside(tmp_path / "set", tmp_path / "cache", url="hf://datasets/mill/race@")
    for path in ("a.png", f"{tmp_path}/cache/a/b.png", "zip://a.png::b.zip", "hf://datasets/mill/race@abc/a.png"):
        assert inside.holds(path)
    for path in ("../a", "/etc/passwd", "file:///etc/passwd", "file:///etc/passwd::hf://datasets/mill/race@abc/a"):
        assert not inside.holds(path) and isinstance(inside.read(path), BadSample)
    for path in ("hf://datasets/mill/racer@a/b", "hf://datasets/mill/race@a/../../x", "http://10.0.0.1/a", "a::b"):
        assert not inside.holds(path)


def test_files_and_globs(tmp_path: Path, rows: list[dict[str, Any]], corpora: Any) -> None:
    write_jsonl(tmp_path / "set", rows)
    (tmp_path / "set" / "more").mkdir()
    (tmp_path / "set" / "more" / "2.csv").write_text("text\nmore\n")
    for number, (name, count) in enumerate([("0.jsonl", 11), ("*.jsonl", COUNT), ("more/*.csv", 1)]):
        summary = run(tmp_path / f"out{number}", tmp_path / "set" / name)
        assert [part["documents"] for part in summary.train] == [count]
        assert summary.train[0]["name"] == ("0", "set", "more")[number]


def test_expressions_of_splits(tmp_path: Path, rows: list[dict[str, Any]], corpora: Any) -> None:
    texts = [{"text": row["text"]} for row in rows]
    made = datasets.Dataset.from_list(texts)
    datasets.DatasetDict(train=made, test=made.select(range(5))).save_to_disk(tmp_path / "saved")
    (tmp_path / "set").mkdir()
    made.to_parquet(tmp_path / "set" / "train-0.parquet")
    made.select(range(5)).to_parquet(tmp_path / "set" / "test-0.parquet")
    for name in ("saved", "set"):
        for number, (split, expected) in enumerate(
            [("train[:10%]", texts[:3]), ("test+train[28:]", texts[:5] + texts[28:])]
        ):
            run(tmp_path / f"{name}{number}", f"{tmp_path / name}::{split}")
            assert corpora.read_samples(tmp_path / f"{name}{number}") == expected


def test_a_folder_like_those_on_the_hub(tmp_path: Path, rows: list[dict[str, Any]], corpora: Any) -> None:
    write_parquet(tmp_path / "set" / "en", rows)
    write_parquet(tmp_path / "set" / "fr", rows[:6], shards=2)
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("en", "fr"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# A set\n")
    run(tmp_path / "a", f"{tmp_path / 'set'}:fr:train", text="text")
    assert corpora.read_samples(tmp_path / "a") == [{"text": row["text"]} for row in rows[:6]]
    for name, message in (
        ("", r"has several configs \(en, fr\); name one, as in datasets:.*set:en$"),
        (":eng", "has no config 'eng'; did you mean 'en'"),
        (":en:tran", "has no split 'tran'; did you mean 'train'"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "b", f"{tmp_path / 'set'}{name}")
    with pytest.raises(UserError, match=r"has no column 'txet'; did you mean 'text'\?; name its columns with --text"):
        run(tmp_path / "b", f"{tmp_path / 'set'}:en", text="txet")
    with pytest.raises(UserError, match=r"cannot load the data set .* check name, config and split$"):
        run(tmp_path / "b", f"{tmp_path / 'set'}:en:tran[:3]")
    (tmp_path / "set" / "set.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(UserError, match="scripts are no longer supported"):
        run(tmp_path / "b", f"{tmp_path / 'set'}:en")


def test_a_data_set_may_not_list_files_of_others(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write_jsonl(tmp_path / "mine", rows)
    (tmp_path / "set").mkdir()
    for file in (f"{tmp_path}/mine/0.jsonl", "../mine/*.jsonl"):
        (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files: {file}\n---\n")
        with pytest.raises(UserError, match=r"set' lists .*mine/0.jsonl, which is not one of its files"):
            run(tmp_path / "out", tmp_path / "set")


def test_what_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> None:
    write_csv(tmp_path / "csv", rows)
    monkeypatch.chdir(tmp_path / "csv")
    for name, message in (
        ("csv", r"'datasets:csv' names a format, not a data set; name the folder or the files: datasets:'data/\*.csv'"),
        (tmp_path / "nowhere", "cannot load the data set .*nowhere"),
        ("mill/none", r"Couldn't reach .* \(HF_HUB_OFFLINE is set\); name a folder to read from this machine$"),
        ("", "'datasets:' names no data set; write datasets:NAME"),
    ):
        with pytest.raises(UserError, match=message) as said:
            run(tmp_path / "out", name)
        assert "\n" not in str(said.value)
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "out", "csv").train[0]["documents"] == COUNT  # a folder goes before a format


@pytest.fixture
def hub(rows: list[dict[str, Any]], tmp_path: Path) -> Iterator[LocalHub]:
    write_parquet(tmp_path / "hub" / "en", rows)
    write_parquet(tmp_path / "hub" / "fr", rows[:6], shards=2)
    files = {str(p.relative_to(tmp_path / "hub")): p.read_bytes() for p in (tmp_path / "hub").rglob("*.parquet")}
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("en", "fr"))
    made = LocalHub(files | {"README.md": f"---\nconfigs:\n{configs}---\n".encode()})
    yield made
    made.stop()


def index(hub: LocalHub, home: Path, *calls: list[str]) -> list[str]:
    """Calls of `millrace data index` in another process, to which `hub` is the hub: what each said last."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "CALLS": json.dumps(calls)}
    code = (
        "import json, os, sys\nfrom millrace.launch.cli import main\n"
        "for call in json.loads(os.environ['CALLS']):\n"
        "    print('status', main(['data', 'index', *call]), file=sys.stderr, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    parts = [part.strip() for part in done.stderr.split("status")]
    return [f"{after.split()[0]} {said.splitlines()[-1]}" for said, after in zip(parts, parts[1:], strict=False)]


def test_data_sets_of_the_hub(hub: LocalHub, tmp_path: Path, rows: list[dict[str, Any]], corpora: Any) -> None:
    roles = ["text", "image", "audio"]
    good = [f"web=datasets:{REPO}:en", *(word for role in roles for word in (f"--{role}", role))]
    expected = [
        ([*good, "--out", "a"], ""),
        ([*good, "--out", "a"], ""),
        ([f"datasets:{REPO}:fr:train[50%:]", "--out", "b"], ""),
        ([f"datasets:{REPO}", "--out", "c"], f"has several configs (en, fr); name one, as in datasets:{REPO}:en"),
        ([f"datasets:{REPO}:en:tests", "--out", "c"], "has no split 'tests'; it has: train"),
        (["datasets:mill/none", "--out", "c"], "Dataset 'mill/none' doesn't exist on the Hub or cannot be accessed"),
    ]
    calls = [[*call[:-1], str(tmp_path / call[-1])] for call, _ in expected]
    for (_, message), said in zip(expected, index(hub, tmp_path / "home", *calls), strict=True):
        assert said.startswith("1 error: ") and message in said if message else said.startswith("0 "), said
    assert corpora.read_samples(tmp_path / "a") == [{role: row[role] for role in roles} for row in rows]
    assert corpora.read_samples(tmp_path / "b") == [{"text": row["text"]} for row in rows[3:6]]


def test_images_of_the_hub_that_rows_name(
    hub: LocalHub, tmp_path: Path, rows: list[dict[str, Any]], corpora: Any
) -> None:
    write_folder(tmp_path / "images", rows[:5], "image")
    hub.files = {path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    call = [f"datasets:{REPO}", "--image", "image", "--out", str(tmp_path / "out")]
    first = index(hub, tmp_path / "home", call)
    assert first[0].startswith("0 "), first
    assert corpora.read_samples(tmp_path / "out") == [{"image": row["image"]} for row in rows[:5]]
    assert prepare(PrepareConfig(inputs=call[:1], out=call[-1], image="image")).already_done  # which needs no hub


def test_a_link_local_hub_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://169.254.169.254")
    with pytest.raises(UserError, match="HF_ENDPOINT is refused: 169.254.169.254 is the link-local address"):
        run(tmp_path / "out", REPO)
