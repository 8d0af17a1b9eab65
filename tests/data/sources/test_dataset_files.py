from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pyarrow as pa
import pytest

from millrace.core.errors import UserError
from millrace.data.dataset_files import DatasetName, dataset_files
from millrace.data.dataset_rows import DatasetRows
from tests.data.sources.check import agree, contents, scan

TEXT = {"text": "text"}
ROWS = [{"text": f"text {i}", "n": i} for i in range(25)]


@pytest.fixture
def saved() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


def arrow_files(name: str) -> list[Path] | None:
    return dataset_files(name, Path("nothing was imported"))


def read(files: list[Path] | None) -> list[dict]:
    assert files is not None
    return [content for file in files for content in contents(scan("arrow", TEXT, file))]


def test_a_saved_data_set_is_read_where_it_lies(tmp_path: Path, saved: datasets.Dataset) -> None:
    saved.save_to_disk(tmp_path / "a", num_shards=3)
    files = arrow_files(f"datasets:{tmp_path / 'a'}")
    assert files == sorted((tmp_path / "a").glob("*.arrow")) and len(files) == 3
    assert read(files) == [{"text": row["text"]} for row in ROWS]
    agree("arrow", TEXT, files[0], [{"text": row["text"]} for row in ROWS[:9]])


def test_rows_that_were_selected_and_shuffled_are_saved_in_their_order(tmp_path: Path, saved: datasets.Dataset) -> None:
    chosen = saved.shuffle(seed=1).select(range(10))
    chosen.save_to_disk(tmp_path / "a")
    assert read(arrow_files(f"datasets:{tmp_path / 'a'}")) == [{"text": text} for text in chosen["text"]]


def test_splits_are_named(tmp_path: Path, saved: datasets.Dataset) -> None:
    datasets.DatasetDict(train=saved, test=saved.select(range(5))).save_to_disk(tmp_path / "a")
    assert len(read(arrow_files(f"datasets:{tmp_path / 'a'}"))) == 25
    assert len(read(arrow_files(f"datasets:{tmp_path / 'a'}::test"))) == 5
    with pytest.raises(UserError, match="has no split 'tests'; did you mean 'test'"):
        arrow_files(f"datasets:{tmp_path / 'a'}::tests")


def test_a_state_that_names_other_files_is_refused(tmp_path: Path, saved: datasets.Dataset) -> None:
    saved.save_to_disk(tmp_path / "a")
    state = tmp_path / "a" / "state.json"
    record = json.loads(state.read_text())
    for name in ("../b.arrow", "/etc/hostname", "missing.arrow"):
        state.write_text(json.dumps(record | {"_data_files": [{"filename": name}]}))
        with pytest.raises(UserError, match="which is not a file of that folder"):
            arrow_files(f"datasets:{tmp_path / 'a'}")
    state.write_text(json.dumps(record | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    assert arrow_files(f"datasets:{tmp_path / 'a'}") is None
    state.write_text("{")
    with pytest.raises(UserError, match="state.json is not a readable part of a saved data set"):
        arrow_files(f"datasets:{tmp_path / 'a'}")


def test_a_prepared_data_set_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert arrow_files(f"datasets:{folder}") is None  # not prepared yet
    loaded = datasets.load_dataset(str(folder), split="train")
    files = arrow_files(f"datasets:{folder}")
    assert files == [Path(file["filename"]) for file in loaded.cache_files]
    assert read(files) == [{"text": row["text"]} for row in ROWS]
    assert arrow_files(f"datasets:{folder}::train[:10%]") is None
    assert arrow_files(f"datasets:{folder / 'train.*'}") is None  # of another name
    with pytest.raises(UserError, match="has no split"):
        DatasetRows(DatasetName.parse(f"datasets:{folder}::tset"), ["text"])
    with pytest.raises(UserError, match=r"cannot load .*nobody/nothing.* \(HF_HUB_OFFLINE is set\); name a folder"):
        arrow_files("datasets:nobody/nothing")


def test_a_single_split_goes_by_its_name(tmp_path: Path, saved: datasets.Dataset) -> None:
    datasets.DatasetDict(test=saved).save_to_disk(tmp_path / "a")
    assert len(read(arrow_files(f"datasets:{tmp_path / 'a' / 'test'}::test"))) == 25
    with pytest.raises(UserError, match="has no split 'train'; it has: test"):
        arrow_files(f"datasets:{tmp_path / 'a'}")
    saved.save_to_disk(tmp_path / "b")
    with pytest.raises(UserError, match="has no split 'test'; it has: train"):
        arrow_files(f"datasets:{tmp_path / 'b'}::test")


@pytest.mark.parametrize("role", ["image", "audio"])
def test_files_that_were_saved_as_bytes_are_read_in_place(tmp_path: Path, corpora: Any, role: str) -> None:
    """`save_to_disk` takes the bytes of files that rows named by path; nothing is decoded."""
    raw = [corpora.make_png(3 + i, 2) if role == "image" else corpora.make_wav(100 + i, 8000) for i in range(6)]
    for number, content in enumerate(raw):
        (tmp_path / f"{number}").write_bytes(content)
    rows = pa.array([{"bytes": r if i % 2 else None, "path": str(tmp_path / f"{i}")} for i, r in enumerate(raw)])
    feature = datasets.Image(decode=False) if role == "image" else datasets.Audio(decode=False)
    features = datasets.Features({"file": feature})
    datasets.Dataset(
        pa.table({"file": rows.cast(feature.pa_type)}), datasets.DatasetInfo(features=features)
    ).save_to_disk(tmp_path / "a")
    (file,) = arrow_files(f"datasets:{tmp_path / 'a'}")
    assert contents(scan("arrow", {role: "file"}, file)) == [{role: content} for content in raw]


def test_rows_that_only_name_files_are_not_read_in_place(tmp_path: Path, saved: datasets.Dataset) -> None:
    """Early releases saved the paths alone. A row without any file (null) does no harm."""
    saved.save_to_disk(tmp_path / "a")
    (file,) = arrow_files(f"datasets:{tmp_path / 'a'}")
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for rows, alone in (
        ([None, {"bytes": b"x", "path": None}, {"bytes": None, "path": None}], False),
        ([None, {"bytes": None, "path": "0.png"}], True),
    ):
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, pa.schema([("image", kind)])) as writer:
            writer.write(pa.record_batch([pa.array(rows, kind)], ["image"]))
        assert arrow_files(f"datasets:{tmp_path / 'a'}") == (None if alone else [file])
