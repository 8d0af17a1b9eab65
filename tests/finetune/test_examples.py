from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace.core.config import load_config
from millrace.core.errors import UserError
from millrace.finetune.classify import Classify
from millrace.finetune.config import FinetuneConfig, check
from millrace.finetune.examples import Record, read_records
from millrace.finetune.sections import ClassifyConfig
from millrace.finetune.source import find_source

Lines = Callable[[Path, list[Any]], Path]


def test_every_form_of_source_gives_the_same_records(tmp_path: Path, lines: Lines) -> None:
    import datasets

    records = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(5)]
    folder = tmp_path / "folder"
    folder.mkdir()
    lines(folder / "a.jsonl", records[:2])
    pq.write_table(pa.Table.from_pylist(records[2:]), folder / "b.parquet")
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(records).save_to_disk(str(saved))
    for name in (folder, folder / "*", saved):
        assert [dict(r.fields) for r in read_records(str(name), {})] == records
    assert [r.where for r in read_records(str(folder), {})][1:3] == [f"{folder}/a.jsonl:2", f"{folder}/b.parquet row 0"]


def test_columns_are_renamed(tmp_path: Path, lines: Lines) -> None:
    path = lines(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}])
    (record,) = read_records(str(path), {"prompt": "instruction", "response": "output"})
    assert record.fields == {"prompt": "a", "response": "b"}


def test_class_labels_of_datasets_come_as_names(tmp_path: Path) -> None:
    import datasets

    names = datasets.ClassLabel(names=["ham", "spam"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features).save_to_disk(str(tmp_path / "d"))
    assert [r.fields["label"] for r in read_records(str(tmp_path / "d"), {})] == ["spam", "ham"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": \n', r"x.jsonl:2 is not JSON .*mend or delete the line"),
        ('{"a": 1}\n\n[1]\n', r"x.jsonl:3 is a list, not an object"),
        (b'{"a": "\xff"}\n', r"x.jsonl:1 is not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        list(read_records(str(path), {}))


@pytest.mark.parametrize("name", ["nothing.jsonl", "./nothing", "no*thing"])
def test_missing_files_are_named(name: str) -> None:
    with pytest.raises(UserError, match="no examples at"):
        list(read_records(name, {}))


def test_other_formats_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="neither .jsonl nor .parquet"):
        list(read_records(str(tmp_path / "a.csv"), {}))


def classify(tokenizer: Any, **options: Any) -> Classify:
    return Classify(FinetuneConfig(source="x", objective=ClassifyConfig(**options)), tokenizer)


def labelled(*labels: Any) -> list[Record]:
    return [Record({"text": f"t{i}", "label": label}, f"a:{i}") for i, label in enumerate(labels)]


def test_labels_are_collected_and_sorted(tokenizer: Any) -> None:
    task = classify(tokenizer)
    train, heldout = task.encode(labelled("b", "a", "b"), labelled("c"))
    assert task.names == ["a", "b", "c"]
    assert [e.labels.tolist() for e in [*train, *heldout]] == [[1], [0], [1], [2]]
    numbers = classify(tokenizer)
    numbers.encode(labelled(10, 9, 9, 10), [])
    assert numbers.names == ["9", "10"]


def test_chosen_labels_leave_others_out(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    task = classify(tokenizer, labels=["spam", "ham"])
    train, _ = task.encode(labelled("Label", "ham", "spam"), [])
    assert task.names == ["spam", "ham"] and [e.where for e in train] == ["a:1", "a:2"]
    assert "1 example(s) left out" in capsys.readouterr().err


def test_lonely_label_is_told(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    classify(tokenizer).encode(labelled("Label", "ham", "ham", "spam", "spam"), [])
    assert "label 'Label' occurs once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        (labelled("a", "a"), {}, "only the label"),
        (labelled("a", None), {}, "a:1: the label is None"),
        (labelled("a", "b"), {"labels": ["a", "x"]}, "no example has the label 'x'"),
        ([Record({"text": "a"}, "a:0")], {}, "a:0 has no field 'label'"),
    ],
)
def test_bad_labels_are_named(tokenizer: Any, records: list[Record], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        classify(tokenizer, **options).encode(records, [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.dropout=0.1"], "lora.dropout = 0.1"),
        (["lora.r=-1"], "lora.r = -1"),
        (["lora.target_modules='all'"], "give 'all-linear' or a list"),
        (["data.columns={promt='x'}"], "data.columns has 'promt'"),
        (["data.heldout_share=1.0"], "data.heldout_share"),
        (["objective.kind=clasify"], "did you mean 'classify'"),
        (["objective.kind=classify", "objective.labels=['a']"], "two or more"),
        (["lora.rank=4"], "unknown key 'lora.rank'"),
        (["train.duration=0 steps"], "train.duration"),
    ],
)
def test_bad_configurations_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(FinetuneConfig, None, overrides)


@pytest.mark.parametrize("name", ["instruct", "classify"])
def test_recipes_load(name: str) -> None:
    folder = Path(__file__).parents[2] / "configs"
    config = load_config(FinetuneConfig, folder / f"finetune_{name}.toml", ["source=runs/mine"])
    assert (config.objective.kind, config.source) == (name, "runs/mine")
    check(config)


def test_source_and_examples_are_needed() -> None:
    with pytest.raises(UserError, match="source is not set"):
        check(load_config(FinetuneConfig, None, []))
    with pytest.raises(UserError, match="data.train is not set"):
        check(load_config(FinetuneConfig, None, ["source=runs/x"]))


def test_sources_are_told_apart(material: Path, tmp_path: Path) -> None:
    step = material / "source" / "checkpoints" / "step-00000007"
    assert find_source(str(material / "source")).checkpoint == step
    assert find_source(str(step)).checkpoint == step
    (tmp_path / "tuned" / "merged").mkdir(parents=True)
    (tmp_path / "tuned" / "merged" / "config.json").write_text("{}")
    assert find_source(str(tmp_path / "tuned")).folder == str(tmp_path / "tuned" / "merged")
    assert find_source(str(tmp_path / "tuned" / "merged")).folder == str(tmp_path / "tuned" / "merged")
    assert find_source("gpt2").folder == "gpt2"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither checkpoints/step-N nor a config.json"):
        find_source(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no such folder; did you mean"):
        find_source(str(tmp_path / "tunned"))
