"""Appending: only new files are read, old samples keep their ordinals, and at no moment is a manifest broken."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.data import index, units
from millrace.data.manifest import Manifest
from millrace.data.prepare import PrepareConfig, Summary, prepare

PARTS = ("", "heldout")


def run(out: Path, *sources: object, **options: Any) -> Summary:
    values = {"vocab_size": 300, "heldout": 0.25} | options
    return prepare(PrepareConfig(inputs=[str(s) for s in sources], out=str(out), **values))


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every input is a unit of work, and an index file is full after 16 samples."""
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    monkeypatch.setattr(index, "CHUNK", 16)


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are scanned."""
    names: list[str] = []
    honest = units.scan_file

    def scan(file: Any, columns: Any) -> Iterator[Any]:
        names.append(Path(file.url).name)
        return honest(file, columns)

    monkeypatch.setattr(units, "scan_file", scan)
    return names


@pytest.fixture
def shards(corpora: Any, tmp_path: Path) -> Path:
    """A folder with three shards of 30 documents, to which `grow` adds two, one of them in the middle."""
    (tmp_path / "in").mkdir()
    for number in (0, 2, 4):
        corpora.write_jsonl(tmp_path / "in" / f"{number}.jsonl", corpora.make_documents(30, seed=number))
    return tmp_path / "in"


def grow(corpora: Any, shards: Path) -> None:
    for number in (1, 5):
        corpora.write_jsonl(shards / f"{number}.jsonl", corpora.make_documents(30, seed=number))


@pytest.mark.parametrize("tokenize", [False, True])
def test_only_new_files_are_read_and_stand_behind_the_old_ones(
    shards: Path, corpora: Any, tmp_path: Path, scanned: list[str], tokenize: bool
) -> None:
    out = tmp_path / "out"
    first = run(out, shards, tokenize=tokenize)
    old = [Manifest.load(out / part) for part in PARTS]
    records = [corpora.read_samples(out / part) for part in PARTS]
    rows = [m.entries(np.arange(m.samples)).rows() for m in old]
    scanned.clear()
    grow(corpora, shards)
    second = run(out, shards, tokenize=tokenize)
    assert scanned == ["1.jsonl", "5.jsonl"] and second.added_files == 2 and not second.already_done
    for part, before, values, entries in zip(PARTS, old, records, rows, strict=True):
        new = Manifest.load(out / part)
        assert new.shards[: len(before.shards)] == before.shards and len(new.shards) > len(before.shards)
        assert new.prefix(before.fingerprint) == len(before.shards) and new.prefix(new.fingerprint) == len(new.shards)
        assert before.prefix(new.fingerprint) is None
        assert str(corpora.read_samples(out / part)[: before.samples]) == str(values)
        assert (new.entries(np.arange(new.samples)).rows()[: before.samples] == entries).all()
        # A run that has the old manifest open reads its index to the end.
        fresh = Manifest(before.folder, {**_record(before), "fingerprint": before.fingerprint})
        assert (fresh.entries(np.arange(before.samples)).rows() == entries).all()
    samples = [Manifest.load(out / part).samples for part in PARTS]
    assert sum(samples) == 150 == sum(s["documents"] for s in (*second.train, *second.heldout))
    assert second.tokenizer == first.tokenizer and second.vocab_size == first.vocab_size
    again = run(out, shards, tokenize=tokenize)
    assert again.already_done and again.fingerprint == second.fingerprint and again.train == second.train


def _record(manifest: Manifest) -> dict[str, Any]:
    return {
        "version": 2,
        "columns": manifest.columns,
        "tokenizer": manifest.tokenizer,
        "costs": manifest.costs,
        "sources": manifest.sources,
        "shards": [vars(shard) for shard in manifest.shards],
        "totals": {name: getattr(manifest, name) for name in ("samples", "bytes", "tokens")},
        "index": manifest.index.listed,
    }


def test_appended_is_what_one_call_in_that_order_would_write(shards: Path, corpora: Any, tmp_path: Path) -> None:
    """Two inputs of one call, and the second added later, give the same fingerprint and the same index files."""
    (tmp_path / "more").mkdir()
    corpora.write_jsonl(tmp_path / "more" / "a.jsonl", corpora.make_documents(50, seed=9))
    tokenizer = str(run(tmp_path / "first", shards).tokenizer)
    whole = run(tmp_path / "whole", shards, tmp_path / "more", tokenizer=tokenizer)
    run(tmp_path / "out", shards, tokenizer=tokenizer)
    grown = run(tmp_path / "out", shards, tmp_path / "more", tokenizer=tokenizer)
    assert grown.fingerprint == whole.fingerprint
    assert (grown.train, grown.heldout) == (whole.train, whole.heldout)
    for part in PARTS:
        wanted, found = (corpora.files_of(tmp_path / name / part / "index") for name in ("whole", "out"))
        assert wanted.items() <= found.items()


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3), min_size=2, max_size=4))
def test_any_series_of_appends(tmp_path: Path, corpora: Any, sizes: list[list[int]]) -> None:
    """Files of 0 to 40 documents in any number of calls: the manifest is always complete, its older states prefixes."""
    work = tmp_path / "series"
    shutil.rmtree(work, ignore_errors=True)
    (work / "in").mkdir(parents=True)
    corpora.write_jsonl(work / "in" / "0.jsonl", corpora.make_documents(20))
    seen: list[str] = [run(work / "out", work / "in").fingerprint]
    texts, lengths = [r["text"] for part in PARTS for r in corpora.read_samples(work / "out" / part)], [20]
    for call, counts in enumerate(sizes):
        for number, count in enumerate(counts):
            documents = corpora.make_documents(count, seed=10 * call + number + 1)
            corpora.write_jsonl(work / "in" / f"{9 - call}{number}.jsonl", documents)
            texts += documents
            lengths.append(count)
        seen.append(run(work / "out", work / "in").fingerprint)
    parts = [Manifest.load(work / "out" / part) for part in PARTS if (work / "out" / part / "manifest.json").exists()]
    assert sum(part.samples for part in parts) == sum(lengths)
    assert sorted(r["text"] for part in parts for r in corpora.read_samples(part.folder)) == sorted(texts)
    places = [parts[0].prefix(fingerprint) for fingerprint in seen]
    assert None not in places and places == sorted(places)
    for part in parts:
        assert [c["samples"] for c in part.index.listed[:-1]] == [16] * (len(part.index.listed) - 1)


def test_replaced_index_files_go_with_the_next_append(shards: Path, corpora: Any, tmp_path: Path) -> None:
    out, listed = tmp_path / "out", []
    for number in (1, 3, 5):
        run(out, shards)
        listed.append({Manifest.load(out).index.path(i).name for i in range(len(Manifest.load(out).index.listed))})
        corpora.write_jsonl(shards / f"{number}.jsonl", corpora.make_documents(7, seed=number))
    there = {path.name for path in (out / "index").iterdir()}
    assert there == listed[1] | listed[2] and listed[0] - there


class Crash(BaseException):
    """Stands for a process that is killed: nothing catches it."""


@pytest.mark.parametrize("tokenize", [False, True])
def test_a_kill_at_any_write_leaves_a_valid_manifest_and_continues(
    shards: Path, corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenize: bool
) -> None:
    """Killed before each rename and removal of an append: the same command ends at the same bytes."""
    start, whole = tmp_path / "start", tmp_path / "whole"
    run(start, shards, tokenize=tokenize)
    grow(corpora, shards)
    shutil.copytree(start, whole)
    run(whole, shards, tokenize=tokenize)
    wanted = corpora.files_of(whole)
    fingerprints = {Manifest.load(start).fingerprint, Manifest.load(whole).fingerprint}
    seen: set[str] = set()
    moments = 0
    for moment in range(1000):
        out = tmp_path / "out"
        shutil.copytree(start, out)
        if not _killed_at(monkeypatch, moment, lambda out=out: run(out, shards, tokenize=tokenize)):
            break
        moments += 1
        now = Manifest.load(out).fingerprint
        assert now in fingerprints
        seen.add(now)
        for part in PARTS:
            manifest = Manifest.load(out / part)
            assert len(corpora.read_samples(out / part)) == manifest.samples
        run(out, shards, tokenize=tokenize)
        found = corpora.files_of(out)
        assert {k: v for k, v in found.items() if k in wanted} == wanted
        # A kill after the last rename leaves the removal of files that nothing refers to, to the next append.
        assert found == wanted or now == Manifest.load(whole).fingerprint
        shutil.rmtree(out)
    assert seen == fingerprints and moments > 15


def test_a_kill_at_any_write_of_the_first_preparation(
    shards: Path, corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    run(whole, shards)
    wanted, moment = corpora.files_of(whole), 0
    while _killed_at(monkeypatch, moment, lambda: run(out, shards)):
        if not (out / "manifest.json").exists():
            with pytest.raises(UserError, match="is half prepared|no manifest in"):
                Manifest.load(out)
        run(out, shards)
        assert corpora.files_of(out) == wanted
        shutil.rmtree(out)
        moment += 1
    assert moment > 15


def _killed_at(monkeypatch: pytest.MonkeyPatch, moment: int, call: Any) -> bool:
    """Run `call`, killed before its `moment`-th rename or removal; whether it was."""
    count = 0

    def deadly(honest: Any) -> Any:
        def step(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > moment:
                raise Crash
            return honest(*args, **options)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", deadly(os.replace))
        patch.setattr(Path, "unlink", deadly(Path.unlink))
        patch.setattr(shutil, "rmtree", deadly(shutil.rmtree))
        try:
            call()
        except Crash:
            return True
    return False


def test_sigkill_while_appending(shards: Path, corpora: Any, tmp_path: Path) -> None:
    run(tmp_path / "out", shards)
    grow(corpora, shards)
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    run(tmp_path / "whole", shards)
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    script = f"""
        import os, signal
        from millrace.data import index, units
        from millrace.data.prepare import PrepareConfig, prepare
        units.UNIT_BYTES, index.CHUNK = 1, 16
        seen = []
        def die(what, done, total):
            seen.append(what)
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        paths = dict(inputs=[{str(shards)!r}], out={str(tmp_path / "out")!r})
        prepare(PrepareConfig(vocab_size=300, heldout=0.25, **paths), die)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert run(tmp_path / "out", shards).reused_units == 1
    assert corpora.files_of(tmp_path / "out") == corpora.files_of(tmp_path / "whole")


def test_what_is_not_appending_is_refused_by_name(shards: Path, corpora: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, shards)
    before = corpora.files_of(out)
    grow(corpora, shards)
    raw = (shards / "2.jsonl").read_bytes()
    (shards / "2.jsonl").write_bytes(raw.replace(b"fox", b"ofx"))
    with pytest.raises(UserError, match=r"2.jsonl changed after .*; prepare into a new folder, or put the old file"):
        run(out, shards)
    (shards / "2.jsonl").unlink()
    with pytest.raises(UserError, match=r"2.jsonl is gone since .*; prepare into a new folder, or put it back"):
        run(out, shards)
    (shards / "2.jsonl").write_bytes(raw)
    for inputs, options in (
        ([shards], {"heldout": 0.5}),
        ([tmp_path / "in" / "1.jsonl", shards / "*.jsonl"], {}),
        ([f"other={shards}"], {}),
    ):
        with pytest.raises(UserError, match="was prepared with other options .*; name a new folder"):
            run(out, *inputs, **options)
    assert corpora.files_of(out) == before
    assert run(out, shards).added_files == 2


def test_a_bad_sample_in_a_new_file_may_be_skipped(shards: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", shards)
    (shards / "9.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match="9.jsonl, document 1: .*--on-bad skip"):
        run(tmp_path / "out", shards)
    summary = run(tmp_path / "out", shards, on_bad="skip")
    assert len(summary.skipped) == 1 and sum(s["documents"] for s in (*summary.train, *summary.heldout)) == 91


def test_abandoned_work_is_forgotten(shards: Path, tmp_path: Path, corpora: Any) -> None:
    """An append that stopped, and whose files were taken away again."""
    run(tmp_path / "out", shards)
    before = corpora.files_of(tmp_path / "out")
    (shards / "8.jsonl").write_text('{"text": "fine"}\n')
    (shards / "9.jsonl").write_bytes(b"no JSON\n")
    with pytest.raises(UserError, match="9.jsonl, document 0"):
        run(tmp_path / "out", shards)
    for name in ("8.jsonl", "9.jsonl"):
        (shards / name).unlink()
    assert run(tmp_path / "out", shards).already_done
    assert corpora.files_of(tmp_path / "out") == before


def test_the_first_held_out_documents_may_come_later(corpora: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    corpora.write_jsonl(tmp_path / "in" / "a.jsonl", ["only one"])
    run(tmp_path / "out", tmp_path / "in", heldout_by="nth")
    assert not (tmp_path / "out" / "heldout").exists()
    corpora.write_jsonl(tmp_path / "in" / "b.jsonl", [f"number {i}" for i in range(8)])
    run(tmp_path / "out", tmp_path / "in", heldout_by="nth")
    assert [r["text"] for r in corpora.read_samples(tmp_path / "out" / "heldout")] == ["number 3", "number 7"]
