from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import feather

from millrace.core.errors import UserError
from millrace.data import index
from millrace.data.config import DataConfig
from millrace.data.loader import build_loader
from millrace.data.manifest import Manifest


def test_entries_describe_every_sample(corpus: Path, documents: list[str]) -> None:
    manifest = Manifest.load(corpus)
    order = np.random.default_rng(0).permutation(90)
    entries = manifest.entries(order)
    assert entries.bytes.tolist() == [len(documents[i].encode()) for i in order]
    assert manifest.shard_of(order).tolist() == [i // 30 for i in order]
    assert entries.at.tolist() == [i % 30 // 7 for i in order]  # row group
    assert entries.extent.tolist() == [i % 30 % 7 for i in order]  # row in it
    assert manifest.block_sizes().tolist() == [7, 7, 7, 7, 2] * 3
    assert (manifest.samples, manifest.bytes) == (90, sum(len(d.encode()) for d in documents))
    assert manifest.tokens == manifest.entries(np.arange(90)).tokens.sum()


def test_the_index_is_cut_into_files_of_a_fixed_number_of_samples(
    corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "CHUNK", 16)
    monkeypatch.setattr(index, "_MAPPED_CHUNKS", 2)
    documents = corpora.make_documents(40)
    corpus = corpora.prepare_documents(tmp_path, documents)
    assert [len(feather.read_table(p)) for p in sorted((corpus / "index").iterdir())] == [16, 16, 8]
    order = np.random.default_rng(0).permutation(40)
    assert Manifest.load(corpus).entries(order).bytes.tolist() == [len(documents[i].encode()) for i in order]


def test_index_files_hold_any_values_in_narrow_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_MAPPED_CHUNKS", 1)
    random, size = np.random.default_rng(0), index.CHUNK + 100
    highs = {"at": 2**40, "extent": 2**16, "bytes": 2**31, "tokens": 2**8, "check": 2**63 - 1}
    columns = {name: random.integers(0, high, size) for name, high in highs.items()}
    columns["check"] -= 2**62
    entries = index.Entries(**columns)
    listed = index.write_index(tmp_path, [entries.part(0, 70), entries.part(70, size)])
    table = feather.read_table(tmp_path / index.index_file(0, listed[0]))
    assert [str(kind) for kind in table.schema.types] == ["uint64", "uint16", "uint32", "uint8", "int64"]
    order = random.permutation(size)
    opened = index.Index(tmp_path, listed)
    assert (index.Entries(*opened.lookup(order)).rows() == entries.rows()[order]).all()
    assert (opened.lookup(order, ("tokens", "check")) == [entries.tokens[order], entries.check[order]]).all()
    assert all((opened.read(i).rows() == entries.rows()[i * index.CHUNK :][: index.CHUNK]).all() for i in range(2))


def test_the_fingerprint_is_of_content_not_of_place(corpora: Any, tmp_path: Path) -> None:
    documents = corpora.make_documents(40)
    here = Manifest.load(corpora.prepare_documents(tmp_path / "here", documents)).fingerprint
    assert Manifest.load(corpora.prepare_documents(tmp_path / "there", documents)).fingerprint == here
    other = documents[:-1] + [documents[-1] + "!"]
    changes: list[tuple[list[str], dict[str, Any]]] = [
        (other, {}),
        (documents[::-1], {}),
        (documents, {"vocab_size": 290}),
        (documents, {"tokenize": True}),
        (documents, {"heldout": 0.3}),
    ]
    for number, (texts, options) in enumerate(changes):
        corpus = corpora.prepare_documents(tmp_path / str(number), texts, **options)
        assert Manifest.load(corpus).fingerprint != here


def test_a_tokenised_corpus_can_be_moved(corpora: Any, tmp_path: Path) -> None:
    corpus = corpora.prepare_documents(tmp_path / "a", corpora.make_documents(40), tokenize=True)
    before = next(build_loader(DataConfig(manifest=str(corpus)), seed=0, batch_rows=1, micro_batch=1, rank=0, world=1))
    shutil.move(corpus, tmp_path / "moved")
    shutil.rmtree(tmp_path / "a")
    config = DataConfig(manifest=str(tmp_path / "moved"))
    after = next(build_loader(config, seed=0, batch_rows=1, micro_batch=1, rank=0, world=1))
    assert (after.micro_batches[0].input_ids_BT == before.micro_batches[0].input_ids_BT).all()
    assert after.spans == before.spans


def edit(**changes: object) -> Callable[[Path], object]:
    def change(corpus: Path) -> None:
        path = corpus / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def index_file(corpus: Path) -> Path:
    (path,) = (corpus / "index").iterdir()
    return path


def swap_index(corpus: Path) -> None:
    path = index_file(corpus)
    table = feather.read_table(path, memory_map=False)
    feather.write_feather(table.take(list(range(1, len(table))) + [0]), path, "uncompressed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: shutil.rmtree(c), "no manifest in .*; write one with `millrace prepare FILES --out .*corpus`"),
        (lambda c: (c / "manifest.json").write_text("{"), "manifest.json is not a readable manifest"),
        (lambda c: (c / "manifest.json").write_text("{}"), "is not a millrace manifest"),
        (edit(version=1), "has version 1, this release reads 2"),
        (edit(tokenizer="0" * 64), "altered by hand: its fingerprint does not fit"),
        (lambda c: index_file(c).unlink(), "cannot read the index file .*00000-.*arrow.*put it back"),
        (swap_index, "the index file .*00000-.*arrow was altered"),
        (lambda c: index_file(c).write_bytes(b"torn"), "cannot read the index file"),
    ],
)
def test_damage_is_named(corpora: Any, tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    corpus = corpora.prepare_documents(tmp_path, corpora.make_documents(40))
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(corpus / "tokenizer", tokenizer)
    change(corpus)
    with pytest.raises(UserError, match=message):
        config = DataConfig(manifest=str(corpus), tokenizer=str(tokenizer))
        next(build_loader(config, seed=0, batch_rows=1, micro_batch=1, rank=0, world=1))


def test_a_manifest_must_be_named() -> None:
    with pytest.raises(UserError, match="data.manifest is not set"):
        Manifest.load("")
