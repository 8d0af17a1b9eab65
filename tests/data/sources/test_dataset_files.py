from __future__ import annotations

import json
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest

from millrace.core.errors import UserError
from millrace.data.dataset_files import arrow_files
from tests.data.sources.check import agree, contents, scan

TEXT = {"text": "text"}
ROWS = [{"text": f"text {i}", "n": i} for i in range(25)]


@pytest.fixture
def saved() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


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
    assert arrow_files("datasets:nobody/nothing") is None
