"""The whole of `curate`: nothing lost, the same bytes whatever the workers and interruptions, mistakes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.data.curate import units
from millrace.data.curate.curate import curate
from millrace.data.prepare import PrepareConfig, prepare
from millrace.launch.curate import main

QUESTION = "Which of the twelve wooden mills beside the river Lea, built in 1776, grinds the most wheat?"


def _corpus(folder: Path, made: SimpleNamespace) -> tuple[list[Path], Path]:
    """Four inputs in three formats with something for every step, and an evaluation file."""
    draw = random.Random(5)
    texts = []
    for number in range(160):
        words = made.prose(number % 60, 150).split(" ")
        if number % 7 == 3:
            words[draw.randrange(len(words))] = "changed"
        texts.append(" ".join(words))
        if number % 11 == 0:
            texts.append(f"too short {number}")
        if number % 29 == 0:
            texts[-1] = made.prose(1000 + number) + QUESTION
    parts = [texts[at::4] for at in range(4)]
    (folder / "text").mkdir(parents=True)
    for number, text in enumerate(parts[0]):
        (folder / "text" / f"{number:03}.txt").write_text(text)
    pq.write_table(pa.table({"text": parts[1]}), folder / "b.parquet", row_group_size=9)
    paths = [made.write(folder / f"{n}.jsonl", parts[n]) for n in (2, 3)]
    made.write(folder / "tasks" / "mills.jsonl", [QUESTION])
    return [folder / "text", folder / "b.parquet", *paths], folder / "tasks" / "mills.jsonl"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, made: SimpleNamespace) -> tuple[list[Path], Path]:
    return _corpus(tmp_path_factory.mktemp("corpus"), made)


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, corpus: tuple[list[Path], Path], made: SimpleNamespace
) -> tuple[Path, dict]:
    """An uninterrupted run of one worker."""
    folder = tmp_path_factory.mktemp("plain")
    result = curate(made.config(folder, corpus[0], eval=[str(corpus[1])]))
    return folder / "out", result.report


def _tree(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def test_everything_is_kept_or_removed(
    corpus: tuple[list[Path], Path], plain: tuple[Path, dict], made: SimpleNamespace
) -> None:
    """Each document once, with its text; the report's numbers are those of the files."""
    out, report = plain
    texts = {f"{path}#0": path.read_text() for path in sorted(corpus[0][0].iterdir())}
    texts |= {f"{corpus[0][1]}#{n}": text for n, text in enumerate(pq.read_table(corpus[0][1])["text"].to_pylist())}
    for path in corpus[0][2:]:
        lines = path.read_text().splitlines()
        texts |= {f"{path}#{n}": json.loads(line)["text"] for n, line in enumerate(lines)}
    kept, removed = made.rows(out), made.rows(out, "removed")
    assert all(texts[row["id"]] == row["text"] for row in kept)
    assert sorted(row["id"] for row in kept + removed) == sorted(texts)
    assert [row["id"] for row in kept] == [name for name in texts if name in {row["id"] for row in kept}]
    total = report["total"]
    assert total["in"] == {"documents": len(texts), "bytes": sum(len(t.encode()) for t in texts.values())}
    assert total["kept"] == {"documents": len(kept), "bytes": sum(len(row["text"].encode()) for row in kept)}
    assert {step: n["documents"] for step, n in total["removed"].items()} == Counter(r["step"] for r in removed)
    assert set(total["removed"]) == {"exact", "quality", "near", "contamination"}
    assert total["in"]["bytes"] == total["kept"]["bytes"] + sum(n["bytes"] for n in total["removed"].values())
    for source in report["sources"]:
        gone = sum(rule["documents"] for rule in source["rules"])
        assert source["in"]["documents"] == source["kept"]["documents"] + gone
    assert all(row["kept"] in {r["id"] for r in kept + removed} for row in removed if row["step"] in ("exact", "near"))
    assert not (out / ".work").exists() and not (out / "flagged").exists()


def test_samples_are_of_their_rule(plain: tuple[Path, dict], made: SimpleNamespace) -> None:
    removed = {row["id"]: row for row in made.rows(plain[0], "removed")}
    shown = [(rule, s) for source in plain[1]["sources"] for rule in source["rules"] for s in rule["samples"]]
    assert all(len(rule["samples"]) == min(3, rule["documents"]) for rule, _ in shown)
    for rule, sample in shown:
        row = removed[sample["id"]]
        assert (row["step"], row["rule"], row["value"]) == (rule["step"], rule["rule"], sample["value"])


def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, corpus: tuple[list[Path], Path], plain: tuple[Path, dict], made: SimpleNamespace
) -> None:
    curate(made.config(tmp_path, corpus[0], eval=[str(corpus[1])], workers=3))
    assert _tree(tmp_path / "out") == _tree(plain[0])


def test_small_units_of_large_files_change_nothing(
    tmp_path: Path,
    corpus: tuple[list[Path], Path],
    plain: tuple[Path, dict],
    made: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(units, "_MIN_BYTES", 5000)
    monkeypatch.setattr(units, "_BATCH", 2)
    report = curate(made.config(tmp_path, corpus[0], eval=[str(corpus[1])])).report
    assert len(list((tmp_path / "out" / "text").iterdir())) > 15
    assert {key: report[key] for key in report if key != "claim"} == {k: plain[1][k] for k in plain[1] if k != "claim"}
    for part in ("text", "removed"):
        assert made.rows(tmp_path / "out", part) == made.rows(plain[0], part)


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=4), st.integers(1, 12))
def test_units_hold_every_document_once_in_order(sizes: list[list[int]], limit: int) -> None:
    runs = [units.Unit(number, 0, [], 0) for number in range(len(sizes))]
    arrays = [np.array(size, np.int64) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "_MIN_BYTES", limit)
        made = units.runs_of_documents(runs, arrays)
    assert [unit.number for unit in made] == list(range(len(made)))
    held = [(unit.run, at) for unit in made for at in range(unit.start, unit.stop)]
    assert held == [(run, at) for run, size in enumerate(sizes) for at in range(len(size))]
    for unit in made:
        inside = sizes[unit.run][unit.start : unit.stop]
        assert unit.bytes == sum(inside) and inside and (sum(inside[:-1]) <= limit + max(inside))


def test_interrupted_anywhere_and_continued(
    tmp_path: Path, corpus: tuple[list[Path], Path], plain: tuple[Path, dict], made: SimpleNamespace
) -> None:
    """Stopped after every unit and band of every pass, once; then the same bytes."""
    config = made.config(tmp_path, corpus[0], eval=[str(corpus[1])])
    seen: set[tuple[str, int]] = set()

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) not in seen:
            seen.add((what, done))
            raise KeyboardInterrupt

    for _ in range(100):
        try:
            curate(config, stop)
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "out" / "report.json").exists() and not (tmp_path / "out" / "text").exists()
    assert len(seen) == 3 * 4 + 14
    assert _tree(tmp_path / "out") == _tree(plain[0])


@pytest.mark.parametrize("mark", ["noted/*.npy", "judged/*.npy", "stats/*.json"])
def test_killed_with_its_workers_and_continued(
    tmp_path: Path, corpus: tuple[list[Path], Path], plain: tuple[Path, dict], mark: str
) -> None:
    out = tmp_path / "out"
    arguments = [*map(str, corpus[0]), "--out", str(out), "--eval", str(corpus[1]), "--workers", "2"]
    command = [sys.executable, "-c", "import sys; from millrace.launch.curate import main; main(sys.argv[1:])"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((out / ".work").glob(mark)) and process.poll() is None:
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
    assert main([*arguments[:-1], "1"]) == 0
    assert _tree(out) == _tree(plain[0])


def test_a_finished_folder_is_not_changed(
    tmp_path: Path, corpus: tuple[list[Path], Path], plain: tuple[Path, dict], made: SimpleNamespace
) -> None:
    before = _tree(plain[0])
    config = made.config(plain[0].parent, corpus[0], eval=[str(corpus[1])], workers=2)
    again = curate(config)
    assert again.already_done and again.report == plain[1] and again.text == str(plain[0] / "text")
    with pytest.raises(UserError, match="was curated with other options .near was True and is now False.; name a new"):
        curate(made.config(plain[0].parent, corpus[0], eval=[str(corpus[1])], near=False))
    with pytest.raises(UserError, match="was curated with other options"):
        curate(made.config(plain[0].parent, corpus[0][:3], eval=[str(corpus[1])]))
    assert _tree(plain[0]) == before


def test_each_step_can_be_switched_off(
    tmp_path: Path, corpus: tuple[list[Path], Path], plain: tuple[Path, dict], made: SimpleNamespace
) -> None:
    steps = {"exact", "quality", "near"}
    for step in steps:
        report = curate(made.config(tmp_path / step, corpus[0], **{step: False})).report
        assert set(report["total"]["removed"]) == steps - {step}
    off = curate(made.config(tmp_path / "off", corpus[0], **dict.fromkeys(steps, False))).report["total"]
    assert off["removed"] == {} and off["kept"] == off["in"] == plain[1]["total"]["in"]


def test_prepare_takes_what_was_kept_and_nothing_else(tmp_path: Path, plain: tuple[Path, dict]) -> None:
    kept = prepare(
        PrepareConfig(inputs=[str(plain[0] / "text")], out=str(tmp_path / "corpus"), count_tokens=False, vocab_size=300)
    )
    assert kept.train[0]["documents"] == plain[1]["total"]["kept"]["documents"]
    with pytest.raises(UserError, match="has no column 'text'"):
        prepare(PrepareConfig(inputs=[str(plain[0])], out=str(tmp_path / "all"), count_tokens=False))


def test_the_page_is_whole_and_escapes(tmp_path: Path, made: SimpleNamespace) -> None:
    made.run(tmp_path, ["<script>alert(1)</script> & so on", made.prose(0)])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; so on" in page
    assert "<script" not in page and "http" not in page and "src=" not in page
    assert "short_doc" in page and "words &lt; 50" in page and "1 of 2 documents kept (50.0%)" in page
    for tag in ("main", "table", "section", "details", "dl", "html"):
        assert page.count(f"<{tag}") == page.count(f"</{tag}>") > 0


def test_undecodable_documents_stop_or_are_counted(tmp_path: Path, made: SimpleNamespace) -> None:
    path = made.write(tmp_path / "in.jsonl", [made.prose(0), made.prose(1), made.prose(0)])
    path.write_bytes(path.read_bytes() + b'{"text": "\xff"}\n{"body": 1}\n')
    with pytest.raises(UserError, match=r"in.jsonl#3: not UTF-8 .*--on-bad skip"):
        curate(made.config(tmp_path, [path]))
    report = curate(made.config(tmp_path, [path], on_bad="skip")).report
    assert report["total"]["in"]["documents"] == 5 and report["total"]["kept"]["documents"] == 2
    removed = {row["id"].rpartition("#")[2]: row["step"] for row in made.rows(tmp_path / "out", "removed")}
    assert removed == {"2": "exact", "3": "unreadable", "4": "unreadable"}


def test_other_options_half_way_are_refused_and_before_that_taken(tmp_path: Path, made: SimpleNamespace) -> None:
    path = made.write(tmp_path / "in.jsonl", [made.prose(0)])
    bad = made.write(tmp_path / "tasks" / "e.jsonl", [""])
    with pytest.raises(UserError, match="e.jsonl has no text"):
        curate(made.config(tmp_path, [path], eval=[str(bad)]))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curate(made.config(tmp_path, [path]), stop)
    with pytest.raises(UserError, match="half curated with other options .exact was True and is now False.; finish"):
        curate(made.config(tmp_path, [path], exact=False))
    made.write(path, [made.prose(0), made.prose(1)])
    with pytest.raises(UserError, match="half curated, but .*in.jsonl changed since"):
        curate(made.config(tmp_path, [path]))


def test_mistakes(tmp_path: Path, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made.write(tmp_path / "in.jsonl", [made.prose(0)])
    with pytest.raises(UserError, match="no input '.*nowhere'"):
        curate(made.config(tmp_path, [tmp_path / "nowhere"]))
    with pytest.raises(UserError, match="no input '.*nothing.jsonl'"):
        curate(made.config(tmp_path, [path], eval=[str(tmp_path / "nothing.jsonl")]))
    with pytest.raises(UserError, match="is a data set of the hub"):
        curate(made.config(tmp_path, ["datasets:wikitext"]))
    with pytest.raises(UserError, match=r"the corpus is empty \(.*empty.jsonl\): it has no documents"):
        curate(made.config(tmp_path / "empty", [made.write(tmp_path / "empty.jsonl", [])]))
    with pytest.raises(UserError, match="holds 'empty' that no `curate` left here"):
        curate(made.config(tmp_path, [path], out=str(tmp_path)))
    with pytest.raises(UserError, match="has no field 'body'"):
        curate(made.config(tmp_path / "body", [path], text="body"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"has 1000 B free, and curation needs about 2\.\d KiB"):
        curate(made.config(tmp_path / "full", [path]))


def test_a_killed_worker_is_reported(tmp_path: Path) -> None:
    from millrace.data.curate.pool import Pool

    with pytest.raises(UserError, match="a worker was killed, .* fewer --workers"), Pool(2) as pool:
        list(pool.each(os._exit, [(9,), (9,)]))
