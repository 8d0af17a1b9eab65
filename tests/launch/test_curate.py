"""`millrace data curate` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from millrace.core.errors import UserError
from millrace.launch.curate import main


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight documents in a folder: one is there twice, one is short."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "text"
    folder.mkdir()
    names = ["old", "new", "red", "blue", "high", "low"]
    for number, name in enumerate(names):
        lines = [f"{name} {chr(97 + i)}{name} {i * number} watermill grinding {name[::-1]}{i} corn" for i in range(12)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    (folder / "6.txt").write_text((folder / "0.txt").read_text().upper())
    (folder / "7.txt").write_text("short")
    return folder


def test_a_table_and_the_folder_to_prepare(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["text", "--out", "curated", "--workers", "1"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(text.parent / "curated" / "text")
    for words in ("curated is curated", "exact", "quality", "kept", "report.html"):
        assert words in said.err
    total = json.loads(Path("curated/report.json").read_text())["total"]
    assert total["in"]["documents"] == 8 and total["removed"]["exact"]["documents"] == 1
    assert main(arguments) == 0
    again = capsys.readouterr()
    assert again.out == said.out and "was already curated" in again.err


def test_steps_are_switched_off(text: Path) -> None:
    off = ["--no-exact", "--no-quality", "--no-near"]
    assert main(["text", "--out", "curated", "--workers", "1", *off]) == 0
    total = json.loads(Path("curated/report.json").read_text())["total"]
    assert total["kept"] == total["in"] and total["removed"] == {}


def test_evaluation_files_after_the_inputs(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("tasks").mkdir()
    words = (text / "1.txt").read_text().split()[:20]
    Path("tasks/one.jsonl").write_text(json.dumps({"question": " ".join(words)}) + "\n")
    Path("tasks/two.jsonl").write_text(json.dumps({"question": "Too short?"}) + "\n")
    options = ["--no-quality", "--no-near", "--contaminated", "report", "--samples", "1", "--workers", "1"]
    assert main(["text", "--eval", "tasks/one.jsonl", "tasks/two.jsonl", "--out", "curated", *options]) == 0
    report = json.loads(Path("curated/report.json").read_text())
    assert [file["found"] for file in report["evaluation"]] == [1, 0]
    assert "two.jsonl: no line has 13 words" in capsys.readouterr().err.replace("\n", " ")
    assert Path("curated/flagged").is_dir() and report["total"]["kept"]["documents"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no input 'nowhere'"),
        (["text", "--kind", "jsnl"], "did you mean 'jsonl'"),
        (["text", "--contaminated", "delete"], "contaminated = 'delete'"),
        (["text", "--workers", "-1"], "workers = -1 must not be negative"),
    ],
)
def test_mistakes(text: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([*arguments, "--out", "curated"])
    assert not Path("curated").exists()


def test_without_datatrove_it_says_what_to_install(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install millrace\[curate\]"):
        main(["text", "--out", "curated"])
