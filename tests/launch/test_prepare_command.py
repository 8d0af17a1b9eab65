"""`millrace prepare` from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.data import SOURCES
from millrace.launch.cli import main


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(f"document {number}: the mill turns and turns. " * 5)
    return folder


def prepare(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "millrace.launch", "prepare", *arguments], capture_output=True, text=True, check=False
    )


def test_a_folder_becomes_a_manifest_and_a_second_call_says_so(text: Path) -> None:
    arguments = ["text", "--out", "corpus", "--vocab-size", "300", "--heldout", "0.2"]
    done = prepare(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(text.parent / "corpus")
    assert "is ready" in done.stderr and "train" in done.stderr and "held out" in done.stderr
    parts = {folder: json.loads(Path(folder, "manifest.json").read_text()) for folder in ("corpus", "corpus/heldout")}
    assert sum(source["documents"] for part in parts.values() for source in part["sources"]) == 30
    again = prepare(*arguments)
    assert again.returncode == 0 and "was already prepared" in again.stderr
    assert again.stdout == done.stdout


def test_sizes_carry_units(text: Path) -> None:
    done = prepare(
        "text",
        "--out",
        "corpus",
        "--vocab-size",
        "0.3k",
        "--train-bytes",
        "1 KiB",
        "--tokenize",
        "--shard-size",
        "1 MiB",
    )
    assert done.returncode == 0, done.stderr
    assert list(Path("corpus/shards").glob("*.parquet"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (
            ["text", "--kind", "jsnl"],
            f"kind = 'jsnl': expected one of auto, {', '.join(SOURCES)}; did you mean 'jsonl'?",
        ),
        (["text", "--vocab-size", "many"], "vocab_size in the command line: cannot read 'many' as a quantity"),
        (["text", "--heldout", "1"], "heldout = 1.0 must be at least 0 and below 1"),
        (["text", "--on-bad", "ignore"], "on_bad = 'ignore'"),
    ],
)
def test_mistakes(text: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", *arguments, "--out", "corpus"]) == 1
    said = capsys.readouterr()
    assert message in said.err and said.out == ""
    assert not Path("corpus/manifest.json").exists()


def test_out_is_needed(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prepare", "text"])
    assert ended.value.code == 2 and "--out" in capsys.readouterr().err
