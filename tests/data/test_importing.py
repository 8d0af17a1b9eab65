"""Rows of the `datasets` library in Parquet shards: every role of every form, interruptions, changes, bad rows."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from millrace.core.errors import UserError
from millrace.data import importing
from millrace.data.config import DataConfig
from millrace.data.loader import build_loader
from millrace.data.manifest import Manifest
from millrace.data.sources.base import MAX_SAMPLE_BYTES
from millrace.launch.cli import main
from tests.data.dataset_folders import (
    COUNT,
    WRITE,
    run,
    save_paths,
    write_csv,
    write_folder,
    write_jsonl,
    write_parquet,
)

pytestmark = pytest.mark.usefixtures("alone")

COLUMNS: list[tuple[str, dict[str, str]]] = [
    ("parquet", {"text": "text", "image": "image", "audio": "audio"}),
    ("parquet", {"text": "text"}),  # the columns of sounds are not touched
    ("parquet", {"image": "image"}),
    ("jsonl", {"text": "text"}),
    ("csv", {"text": "text"}),
    ("images", {"text": "text", "image": "image"}),
    ("sounds", {"text": "text", "audio": "audio"}),
    ("sounds", {"text": "text"}),
    ("tar", {"text": "txt", "image": "png", "audio": "wav"}),
]


@pytest.mark.parametrize(("form", "columns"), COLUMNS)
def test_every_role_of_every_builder(
    tmp_path: Path, rows: list[dict[str, Any]], corpora: Any, form: str, columns: dict[str, str]
) -> None:
    WRITE[form](tmp_path / "set", rows)
    summary = run(tmp_path / "out", tmp_path / "set", shard_size=1500, **columns)
    assert corpora.read_samples(tmp_path / "out") == [{role: row[role] for role in columns} for row in rows]
    assert (summary.train[0]["name"], summary.train[0]["documents"], summary.skipped) == ("set", COUNT, [])
    shards = Manifest.load(tmp_path / "out").shards
    assert {shard.kind for shard in shards} == {"parquet"} and all(shard.url.startswith("raw/000/") for shard in shards)
    for shard in shards:
        assert pq.read_schema(tmp_path / "out" / shard.url).names == list(columns.values())


@pytest.mark.parametrize(("form", "kind"), [("parquet", pa.uint16()), ("jsonl", pa.int64())])
def test_tokens(tmp_path: Path, rows: list[dict[str, Any]], corpora: Any, form: str, kind: pa.DataType) -> None:
    corpora.prepare_documents(tmp_path / "t", corpora.make_documents(20))
    WRITE[form](tmp_path / "set", rows)
    tokenizer = str(tmp_path / "t" / "corpus" / "tokenizer")
    run(tmp_path / "out", tmp_path / "set", tokens="tokens", tokenizer=tokenizer, count_tokens=True)
    found = corpora.read_samples(tmp_path / "out")
    assert [sample["tokens"].tolist() for sample in found] == [row["tokens"] for row in rows]
    assert pq.read_schema(tmp_path / "out" / "raw" / "000" / "00000.parquet").field("tokens").type.value_type == kind


class Stop(Exception):
    pass


@pytest.mark.parametrize("form", ["parquet", "jsonl", "csv", "images", "tar", "prepared"])
def test_an_interrupted_import_continues_where_it_was(
    tmp_path: Path, rows: list[dict[str, Any]], corpora: Any, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Stopped behind every shard in turn: the files are those of an import without interruption."""
    WRITE["parquet" if form == "prepared" else form](tmp_path / "set", rows)
    name = f"{tmp_path / 'set'}::train[:90%]" if form == "prepared" else tmp_path / "set"
    columns = {"text": "txt" if form == "tar" else "text"}
    run(tmp_path / "whole", name, shard_size=90, **columns)
    left = 0

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("reading datasets:"):
            raise Stop

    read = []
    honest = importing.value_of
    monkeypatch.setattr(importing, "value_of", lambda *a: read.append(a[1]) or honest(*a))
    while True:
        left += 1
        try:
            run(tmp_path / "out", name, shard_size=90, progress=interrupt, **columns)
            break
        except Stop:
            assert left < 40
    assert left >= 5 and len(read) == len(corpora.read_samples(tmp_path / "whole"))  # no row twice
    raw = {
        path: content for path, content in corpora.files_of(tmp_path / "whole" / "raw").items() if "json" not in path
    }
    assert raw == {p: c for p, c in corpora.files_of(tmp_path / "out" / "raw").items() if "json" not in p}
    assert Manifest.load(tmp_path / "out").fingerprint == Manifest.load(tmp_path / "whole").fingerprint


def test_a_shard_that_was_not_noted_is_written_again(
    tmp_path: Path, rows: list[dict[str, Any]], corpora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the shard's last rename and the note of it."""
    write_jsonl(tmp_path / "set", rows)
    honest, calls = importing.write_atomic, []

    def die(path: Path, text: str) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise Stop
        honest(path, text)

    monkeypatch.setattr(importing, "write_atomic", die)
    with pytest.raises(Stop):
        run(tmp_path / "out", tmp_path / "set", shard_size=90)
    assert len(list((tmp_path / "out" / "raw" / "000").glob("*.parquet"))) == 2
    run(tmp_path / "out", tmp_path / "set", shard_size=90)
    assert corpora.read_samples(tmp_path / "out") == [{"text": row["text"]} for row in rows]


def test_a_data_set_that_changed_is_imported_anew_until_all_is_done(
    tmp_path: Path, rows: list[dict[str, Any]], corpora: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "set", rows)

    def interrupt(what: str, done: int, total: int) -> None:
        if done > 200:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "out", tmp_path / "set", shard_size=90, progress=interrupt)
    (tmp_path / "set" / "0.jsonl").write_text('{"text": "new", "tokens": [1]}\n')
    run(tmp_path / "out", tmp_path / "set", shard_size=90)
    assert "changed since the interruption: importing it again" in capsys.readouterr().err
    expected = [{"text": "new"}, *({"text": row["text"]} for row in rows[11:])]
    assert corpora.read_samples(tmp_path / "out") == expected
    (tmp_path / "set" / "1.jsonl").unlink()  # what was imported is a copy
    assert run(tmp_path / "out", tmp_path / "set", shard_size=90).already_done
    datasets.load_dataset(str(tmp_path / "set"))  # and stays one where the cache of `datasets` has it too
    assert run(tmp_path / "out", tmp_path / "set", shard_size=90).already_done
    write_csv(tmp_path / "more", rows[:3])
    added = run(tmp_path / "out", tmp_path / "set", tmp_path / "more", shard_size=90)
    assert added.added_files == 1
    assert corpora.read_samples(tmp_path / "out") == expected + [{"text": row["text"]} for row in rows[:3]]


def test_a_prepared_data_set_that_changed_is_refused(tmp_path: Path, rows: list[dict[str, Any]], corpora: Any) -> None:
    write_jsonl(tmp_path / "set", rows)
    (file,) = datasets.load_dataset(str(tmp_path / "set"), split="train").cache_files
    run(tmp_path / "out", tmp_path / "set")
    assert [shard.url for shard in Manifest.load(tmp_path / "out").shards] == [file["filename"]]
    assert corpora.read_samples(tmp_path / "out") == [{"text": row["text"]} for row in rows]
    assert run(tmp_path / "out", tmp_path / "set").already_done
    (tmp_path / "set" / "2.jsonl").write_text('{"text": "appended", "tokens": []}\n')
    for _ in range(2):  # before it is prepared again, and after
        with pytest.raises(UserError, match=r"set' changed after .*out was prepared, or its files in the cache"):
            run(tmp_path / "out", tmp_path / "set")
        datasets.load_dataset(str(tmp_path / "set"))


def test_a_cache_that_is_out_of_date_is_not_read(tmp_path: Path, rows: list[dict[str, Any]], corpora: Any) -> None:
    """`datasets` itself would: it looks at README.md alone."""
    write_jsonl(tmp_path / "set", rows)
    (tmp_path / "set" / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: '*.jsonl'\n---\n")
    datasets.load_dataset(str(tmp_path / "set"))
    run(tmp_path / "a", tmp_path / "set")
    assert [shard.kind for shard in Manifest.load(tmp_path / "a").shards] == ["arrow"]
    (tmp_path / "set" / "2.jsonl").write_text('{"text": "appended", "tokens": []}\n')
    assert len(datasets.load_dataset(str(tmp_path / "set"), split="train")) == COUNT
    with pytest.raises(UserError, match=r"set' changed after .*a was prepared, or its files in the cache"):
        run(tmp_path / "a", tmp_path / "set")
    for number, split in enumerate(["train", "train[20:]"]):
        run(tmp_path / str(number), f"{tmp_path / 'set'}::{split}")
        assert len(corpora.read_samples(tmp_path / str(number))) == (COUNT + 1, COUNT - 19)[number]


def test_rows_of_files_are_imported_from_the_cache_too(
    tmp_path: Path, rows: list[dict[str, Any]], corpora: Any
) -> None:
    """`load_dataset` keeps the paths of a folder's images, not the images."""
    write_folder(tmp_path / "set", rows, "image")
    datasets.load_dataset(str(tmp_path / "set"))
    run(tmp_path / "out", tmp_path / "set", image="image")
    assert corpora.read_samples(tmp_path / "out") == [{"image": row["image"]} for row in rows]
    assert {shard.kind for shard in Manifest.load(tmp_path / "out").shards} == {"parquet"}


def test_an_archive_of_images(tmp_path: Path, rows: list[dict[str, Any]], corpora: Any) -> None:
    (tmp_path / "set").mkdir()
    with zipfile.ZipFile(tmp_path / "set" / "train.zip", "w") as archive:
        for number, row in enumerate(rows):
            archive.writestr(f"{number:02d}.png", row["image"])
    run(tmp_path / "out", tmp_path / "set", image="image")
    assert corpora.read_samples(tmp_path / "out") == [{"image": row["image"]} for row in rows]


def test_bad_rows(tmp_path: Path, rows: list[dict[str, Any]], corpora: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that are missing, too large or elsewhere; paths are relative to the data set's folder."""
    for number, row in enumerate(rows[:4]):
        (tmp_path / f"{number}.png").write_bytes(row["image"])
    paths = ["0.png", "../2.png", str(tmp_path / "2.png"), "link.png", "gone.png", "huge.png", "memory://x", "1.png"]
    save_paths(tmp_path / "set", paths)
    for name in ("0.png", "1.png"):
        (tmp_path / name).rename(tmp_path / "set" / name)
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "3.png")
    with open(tmp_path / "set" / "huge.png", "wb") as file:
        file.truncate(MAX_SAMPLE_BYTES + 1)
    with pytest.raises(UserError, match=r"row 1: the file '../2.png' lies outside of the data set; .* --on-bad skip"):
        run(tmp_path / "out", tmp_path / "set", image="image")
    summary = run(tmp_path / "out", tmp_path / "set", image="image", on_bad="skip")
    assert corpora.read_samples(tmp_path / "out") == [{"image": row["image"]} for row in rows[:2]]
    assert len(summary.skipped) == 6 and all("is null" in why for why in summary.skipped)
    said = capsys.readouterr().err
    for row, why in enumerate(
        ["lies outside"] * 3 + ["cannot be read: No such file", "has more than", "lies outside"], 1
    ):
        assert f"row {row}: the file '{paths[row]}' {why}" in said


def test_values_of_the_wrong_type(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_text('{"n": 3, "empty": null, "mixed": ["a"]}\n')
    for columns, why in (
        ({"text": "n"}, "the text is int, not a string"),
        ({"text": "empty"}, "the text is null"),
        ({"image": "n"}, "the image is int, neither bytes nor the path of a file"),
        ({"audio": "mixed"}, "the audio is list, neither bytes"),
    ):
        with pytest.raises(UserError, match=f"row 0: {why}"):
            run(tmp_path / "out", tmp_path / "set", **columns)


def test_images_become_batches(tmp_path: Path, rows: list[dict[str, Any]], corpora: Any) -> None:
    """`millrace data index` on a folder of Parquet, then whole samples."""
    write_parquet(tmp_path / "set", rows)
    tokenizer = corpora.prepare_documents(tmp_path / "t", corpora.make_documents(20)) / "tokenizer"
    columns = ["--text", "text", "--image", "image", "--tokenizer", str(tokenizer)]
    assert main(["data", "index", f"datasets:{tmp_path / 'set'}", *columns, "--out", str(tmp_path / "out")]) == 0
    config = DataConfig(manifest=str(tmp_path / "out"), rows="samples", window=COUNT, prefetch=0, threads=2)
    seen = {}
    with build_loader(config, seed=2, batch_rows=6, micro_batch=6, rank=0, world=1) as loader:
        for _ in range(COUNT // 6):
            (micro,) = next(loader).micro_batches
            assert all(micro.good)
            seen |= dict(zip(micro.samples, micro.values["image"], strict=True))
    assert sorted(seen) == list(range(COUNT))
    for sample, image in seen.items():
        assert torch.equal(image, torch.zeros(2, 3 + sample % 5, 3, dtype=torch.uint8))
