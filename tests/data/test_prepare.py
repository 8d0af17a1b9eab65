from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from millrace.core.errors import UserError
from millrace.data import units
from millrace.data.corpus import Corpus
from millrace.data.manifest import Manifest
from millrace.data.prepare import PrepareConfig, Summary, prepare
from millrace.data.reader import ShardReader
from millrace.data.tokenizer import load_tokenizer


def run(
    out: Path, *sources: object, progress: Callable[[str, int, int], None] | None = None, **options: Any
) -> Summary:
    config = PrepareConfig(inputs=[str(s) for s in sources], out=str(out), **{"vocab_size": 300} | options)
    return prepare(config, progress) if progress else prepare(config)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def texts_of(folder: Path) -> list[Any]:
    manifest = Manifest.load(folder)
    contents = ShardReader(Corpus([manifest])).read(np.arange(manifest.samples))
    return [content.get("tokens", content.get("text")) for content in contents]


@pytest.fixture
def shards(corpora: Any, tmp_path: Path) -> Path:
    """A folder with five shards of 40 documents."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(5):
        corpora.write_jsonl(folder / f"{number}.jsonl", corpora.make_documents(40, seed=number))
    return folder


def test_counts_are_exact_for_every_source(shards: Path, corpora: Any, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("one document\n")
    (tmp_path / "more" / "b.md").write_text("another é\n")
    (tmp_path / "more" / "c.png").write_bytes(b"\x89PNG")
    summary = run(tmp_path / "out", shards, tmp_path / "more")
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    expected = (
        [d for n in range(5) for d in corpora.make_documents(40, seed=n)],
        ["one document\n", "another é\n"],
    )
    for counts, documents in zip(summary.train, expected, strict=True):
        assert counts["documents"] == len(documents)
        assert counts["bytes"] == sum(len(d.encode()) for d in documents)
        assert counts["tokens"] == sum(len(ids) + 1 for ids in tokenizer.encode(documents))
    assert texts_of(tmp_path / "out") == [d for part in expected for d in part]
    assert summary.vocab_size == tokenizer.vocab_size and Path(summary.out) == tmp_path / "out"


def test_files_folders_and_globs_name_the_same(shards: Path, tmp_path: Path) -> None:
    every = [shards / f"{n}.jsonl" for n in range(5)]
    made = [run(tmp_path / "a", shards), run(tmp_path / "b", shards / "*.jsonl"), run(tmp_path / "c", *every)]
    assert len({summary.fingerprint for summary in made}) == 1


@pytest.mark.parametrize("by", ["hash", "nth"])
def test_held_out_documents_are_apart(shards: Path, tmp_path: Path, by: str) -> None:
    summary = run(tmp_path / "out", shards, heldout=0.2, heldout_by=by)
    train, held = texts_of(tmp_path / "out"), texts_of(tmp_path / "out" / "heldout")
    assert len(train) + len(held) == 200 and summary.heldout[0]["documents"] == len(held)
    if by == "nth":
        assert len(held) == 40
    else:
        assert 20 < len(held) < 60
        assert not set(train) & set(held)  # equal documents fall on the same side


def test_the_tokenizer_does_not_see_held_out_text(corpora: Any, tmp_path: Path) -> None:
    documents = ["plain text " * 20, "zyzyzyzyzy " * 200] * 20
    corpora.write_jsonl(tmp_path / "a.jsonl", documents)
    run(tmp_path / "out", tmp_path / "a.jsonl", heldout=0.5, heldout_by="nth")
    assert "zy" not in load_tokenizer(tmp_path / "out" / "tokenizer").backend.get_vocab()
    run(tmp_path / "all", tmp_path / "a.jsonl")
    assert "zy" in load_tokenizer(tmp_path / "all" / "tokenizer").backend.get_vocab()


def test_the_tokenizer_reads_a_bounded_share_of_every_unit(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    read: dict[str, int] = {}
    run(tmp_path / "out", shards, train_bytes=10_000, progress=lambda what, done, _: read.update({what: done}))
    assert 8_000 < read["reading text for the tokenizer"] < 13_000


def test_tokenised_shards_are_rolled_and_hold_the_tokens(shards: Path, corpora: Any, tmp_path: Path) -> None:
    run(tmp_path / "out", shards, tokenize=True, shard_size=2000, heldout=0.1)
    manifest, tokenizer = Manifest.load(tmp_path / "out"), load_tokenizer(tmp_path / "out" / "tokenizer")
    assert len(manifest.shards) > 5
    assert all(shard.url.startswith("shards/") and shard.kind == "parquet" for shard in manifest.shards)
    assert str(pq.read_schema(manifest.shard_url(0)).field("tokens").type) == "list<element: uint16>"
    plain = run(tmp_path / "plain", shards, heldout=0.1)
    for part in ("", "heldout"):
        tokens = texts_of(tmp_path / "out" / part)
        for ids, text in zip(tokens, texts_of(Path(plain.out) / part), strict=True):
            assert tokenizer.decode(ids) == text
    entries = manifest.entries(np.arange(manifest.samples))
    assert entries.tokens.tolist() == [len(ids) + 1 for ids in texts_of(tmp_path / "out")]


class Stop(Exception):
    """Stands for an interruption."""


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize("after", [1, 2, 4, 5])
def test_an_interrupted_call_continues_to_the_same_bytes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenize: bool, after: int
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)  # every file is a unit
    options: dict[str, Any] = {"tokenize": tokenize, "heldout": 0.2}
    run(tmp_path / "whole", shards, **options)
    done: list[int] = []

    def interrupt(what: str, count: int, total: int) -> None:
        if what == "preparing":
            done.append(count)
            if len(done) == 2 * after:  # each unit reports once inside and once at its end
                raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "out", shards, progress=interrupt, **options)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(UserError, match="is half prepared; run the same `millrace prepare` again"):
        Manifest.load(tmp_path / "out")
    summary = run(tmp_path / "out", shards, **options)
    assert summary.reused_units == after
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_sigkill_in_the_middle_of_a_unit(shards: Path, tmp_path: Path) -> None:
    script = f"""
        import os, signal
        from millrace.data import units
        from millrace.data.prepare import PrepareConfig, prepare
        units.UNIT_BYTES = 1
        seen = []
        def die(what, done, total):
            seen.append(what)
            if seen.count("preparing") == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        paths = dict(inputs=[{str(shards)!r}], out={str(tmp_path / "out")!r})
        prepare(PrepareConfig(vocab_size=300, tokenize=True, **paths), die)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "manifest.json").exists()
    units_before = units.UNIT_BYTES
    try:
        units.UNIT_BYTES = 1
        assert run(tmp_path / "out", shards, tokenize=True).reused_units == 2
        run(tmp_path / "whole", shards, tokenize=True)
    finally:
        units.UNIT_BYTES = units_before
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_finished_folder_is_left_alone(shards: Path, tmp_path: Path) -> None:
    first = run(tmp_path / "out", shards)
    before = files_of(tmp_path / "out")
    os.utime(shards / "0.jsonl")  # a copy with another time is the same input
    again = run(tmp_path / "out", shards)
    assert again.already_done and again.fingerprint == first.fingerprint and again.train == first.train
    assert again.tokenizer == first.tokenizer and again.out == first.out
    with pytest.raises(UserError, match="prepared with other options .*heldout was 0.0 and is now 0.1.*new folder"):
        run(tmp_path / "out", shards, heldout=0.1)
    raw = (shards / "3.jsonl").read_text()
    (shards / "3.jsonl").write_text(raw.replace("fox", "ofx"))
    with pytest.raises(UserError, match="3.jsonl changed after .* was prepared; prepare into a new folder"):
        run(tmp_path / "out", shards)
    (shards / "3.jsonl").unlink()
    with pytest.raises(UserError, match="3.jsonl is gone since"):
        run(tmp_path / "out", shards)
    assert files_of(tmp_path / "out") == before


def test_inputs_that_change_before_the_end_are_prepared_again(
    shards: Path, corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    seen: list[str] = []

    def interrupt(what: str, count: int, total: int) -> None:
        seen.append(what)
        if seen.count("preparing") == 6:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "out", shards, progress=interrupt)
    corpora.write_jsonl(shards / "1.jsonl", ["changed in between"])
    summary = run(tmp_path / "out", shards)
    assert summary.reused_units == 0  # the tokenizer was trained again
    assert "changed in between" in texts_of(tmp_path / "out")
    run(tmp_path / "whole", shards)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def interrupt_after(units_done: int) -> Callable[[str, int, int], None]:
    """A progress that interrupts when so many units (of one file each, with UNIT_BYTES = 1) are finished."""
    seen: list[int] = []

    def interrupt(what: str, count: int, total: int) -> None:
        seen.extend([count] if what == "preparing" else [])
        if len(seen) > 2 * units_done:
            raise Stop

    return interrupt


def test_a_half_prepared_folder_refuses_other_options(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    with pytest.raises(Stop):
        run(tmp_path / "out", shards, progress=interrupt_after(2))
    with pytest.raises(UserError, match="half prepared with other options .tokenize was False and is now True"):
        run(tmp_path / "out", shards, tokenize=True)


def test_a_mistake_before_the_first_unit_does_not_bind(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no input"):
        run(out, tmp_path / "shard", vocab_size=400)
    assert run(out, shards).train[0]["documents"] == 200
    with pytest.raises(Stop):
        run(tmp_path / "other", shards, vocab_size=400, progress=interrupt_after(0))
    run(tmp_path / "other", shards)
    assert files_of(tmp_path / "other") == files_of(out)  # not the tokenizer of the first options


def test_bad_documents_may_be_skipped_in_what_they_stopped(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    last = sorted(shards.iterdir())[-1]
    last.write_bytes(last.read_bytes().replace(b"fox", b"f\xffx", 1))
    options = {"tokenizer": str(Path(run(tmp_path / "first", sorted(shards.iterdir())[0]).tokenizer or ""))}
    with pytest.raises(UserError, match="--on-bad skip"):
        run(tmp_path / "out", shards, **options)
    summary = run(tmp_path / "out", shards, on_bad="skip", **options)
    assert summary.reused_units == len(list(shards.iterdir())) - 1 and len(summary.skipped) == 1


def test_undecodable_documents_stop_or_are_left_out(corpora: Any, tmp_path: Path) -> None:
    path = corpora.write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"two", b"t\xffo"))
    at = raw.index(b"two") + 1
    with pytest.raises(UserError, match=f"a.jsonl, document 1: not UTF-8 at byte {at} .*--on-bad skip"):
        run(tmp_path / "stopped", path)
    assert not (tmp_path / "stopped" / "manifest.json").exists()
    summary = run(tmp_path / "out", path, on_bad="skip")
    assert texts_of(tmp_path / "out") == ["one", "three"]
    assert len(summary.skipped) == 1 and f"not UTF-8 at byte {at}" in summary.skipped[0]
    (tmp_path / "b.txt").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match="b.txt, document 0: not UTF-8 at byte 3"):
        run(tmp_path / "text", tmp_path / "b.txt")


@pytest.mark.parametrize(
    ("content", "heldout", "message"),
    [
        ("", 0.0, "the corpus is empty .*it has no documents"),
        ("\n \n", 0.0, "the corpus is empty"),
        ('{"text": "a"}\n', 0.999999, "the corpus is empty .*all 1 documents were held out"),
    ],
)
def test_an_empty_corpus_is_refused(tmp_path: Path, content: str, heldout: float, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", tmp_path / "a.jsonl", heldout=heldout)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_bad_inputs_are_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to prepare"):
        run(tmp_path / "out")
    with pytest.raises(UserError, match="set out"):
        prepare(PrepareConfig(inputs=["a"]))
    with pytest.raises(UserError, match="no input '.*0.jsonk'.*did you mean '.*0.jsonl'"):
        run(tmp_path / "a", shards / "0.jsonk")
    with pytest.raises(UserError, match="a data set of the hub is written datasets:NAME"):
        run(tmp_path / "b", "wikitext")
    with pytest.raises(UserError, match="0.jsonl is named twice"):
        run(tmp_path / "c", shards, shards / "0.jsonl")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match="pictures holds no .jsonl.*it is empty"):
        run(tmp_path / "d", tmp_path / "pictures")
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="holds no .jsonl, .* file .it has: .png.; name files with a glob"):
        run(tmp_path / "e", tmp_path / "pictures")
    with pytest.raises(UserError, match="document 0: the line at byte 0 has no field 'body' .it has: text."):
        run(tmp_path / "f", shards, text="body")


def test_a_full_disk_is_named_and_nothing_is_lost(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(units, "write_parquet", full)
        with pytest.raises(UserError, match="cannot write to .*out: No space left on device; free space"):
            run(tmp_path / "out", shards)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run(tmp_path / "out", shards).train[0]["documents"] == 200


def test_a_foreign_folder_is_not_touched(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "tokenizer").mkdir(parents=True)
    with pytest.raises(UserError, match="holds 'tokenizer' that no `prepare` left here; name a new folder"):
        run(tmp_path / "out", shards)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["tokenizer"]
    with pytest.raises(UserError, match="holds '.*jsonl' that no `prepare` left here"):
        run(shards, shards)  # into the corpus itself
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file"):
        run(tmp_path / "file" / "out", shards)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heldout": 1.0}, "heldout = 1.0 must be"),
        ({"heldout": 0.6, "heldout_by": "nth"}, "above 0.5"),
        ({"shard_size": 0}, "shard_size = 0"),
        ({"tokenize": True, "count_tokens": False}, "tokenize = true needs count_tokens"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**options)


def test_progress_never_goes_back_and_ends_at_the_total(shards: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(
        tmp_path / "out",
        shards,
        progress=lambda what, done, total: seen.append((done, total)) if what == "preparing" else None,
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(p.stat().st_size for p in shards.iterdir())


def test_shard_hashes_are_of_the_files(shards: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", shards)
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for shard in record["shards"]:
        assert shard["sha256"] == hashlib.sha256(Path(shard["url"]).read_bytes()).hexdigest()
