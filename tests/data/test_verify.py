"""`data verify`: every missing, short or altered file is named, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import feather

from millrace.core.errors import UserError
from millrace.data import index
from millrace.data.index import Index, index_file, to_entries
from millrace.data.prepare import PrepareConfig, prepare
from millrace.data.verify import Report, verify


def look(folder: Path) -> Report:
    return verify(folder, lambda what, done, total: None)


@pytest.fixture
def corpus(corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five shards of 40 documents, some of each held out; several index files."""
    monkeypatch.setattr(index, "CHUNK", 16)
    (tmp_path / "in").mkdir()
    for number in range(5):
        corpora.write_jsonl(tmp_path / "in" / f"{number}.jsonl", corpora.make_documents(40, seed=number))
    config = PrepareConfig(inputs=[str(tmp_path / "in")], out=str(tmp_path / "out"), vocab_size=300, heldout=0.3)
    prepare(config)
    return tmp_path / "out"


def test_all_is_well(corpus: Path, corpora: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(corpus / "manifest.json", lambda what, done, total: seen.append((done, total)))
    size = sum(path.stat().st_size for path in (tmp_path / "in").iterdir())
    assert (report.shards, report.bytes, report.problems) == (5, size, [])
    assert report.index_files == sum(len(list((corpus / part / "index").iterdir())) for part in ("", "heldout"))
    assert seen == sorted(seen) and seen[-1] == (size, size)
    written = corpora.prepare_documents(tmp_path / "b", corpora.make_documents(90), tokenize=True, shard_size=500)
    assert look(written).shards > 3 and not look(written).problems


def test_every_shard_that_differs_is_named(corpus: Path, tmp_path: Path) -> None:
    shards = tmp_path / "in"
    (shards / "0.jsonl").unlink()
    (shards / "1.jsonl").write_bytes((shards / "1.jsonl").read_bytes()[:-1])
    raw = bytearray((shards / "3.jsonl").read_bytes())
    raw[100] ^= 1
    (shards / "3.jsonl").write_bytes(raw)
    (shards / "4.jsonl").write_bytes((shards / "4.jsonl").read_bytes() + b"\n")
    found = {Path(p.url).name: p.what for p in look(corpus).problems}
    size = len(raw)
    assert found.keys() == {"0.jsonl", "1.jsonl", "3.jsonl", "4.jsonl"}
    assert found["0.jsonl"].startswith("missing: ") and found["3.jsonl"] == "altered: its SHA-256 differs"
    assert found["1.jsonl"].startswith("short: it has ") and found["4.jsonl"].startswith("altered: it has ")
    assert size == (shards / "3.jsonl").stat().st_size


def swapped(path: Path) -> None:
    table = feather.read_table(path, memory_map=False)
    feather.write_feather(table.take([1, 0, *range(2, len(table))]), path, "uncompressed")


@pytest.mark.parametrize("change", [Path.unlink, swapped, lambda path: path.write_bytes(b"torn")])
@pytest.mark.parametrize("part", ["", "heldout"])
def test_index_files_that_differ_are_named(corpus: Path, part: str, change: Callable[[Path], object]) -> None:
    paths = sorted((corpus / part / "index").iterdir())
    changed = [paths[0], paths[2]]
    for path in changed:
        change(path)
    assert [Path(problem.url) for problem in look(corpus).problems] == changed


def test_an_index_that_was_replaced_as_a_whole_is_found(corpus: Path) -> None:
    """The rows of a file and its hash in manifest.json both altered: the fingerprint is of the rows too."""
    record = json.loads((corpus / "manifest.json").read_text())
    swapped(corpus / "index" / index_file(1, record["index"][1]))
    entries = to_entries(feather.read_table(corpus / "index" / index_file(1, record["index"][1])))
    old = corpus / "index" / index_file(1, record["index"][1])
    record["index"][1]["sha256"] = entries.digest()
    old.rename(corpus / "index" / index_file(1, record["index"][1]))
    (corpus / "manifest.json").write_text(json.dumps(record))
    assert Index(corpus / "index", record["index"]).read(1).digest() == entries.digest()
    (problem,) = look(corpus).problems
    assert "0.jsonl are not that shard's" in problem.what


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no manifest in"):
        look(tmp_path)
