"""`millrace data stat`, `peek` and `simulate`, as a user sees them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from millrace.data.config import DataConfig
from millrace.data.loader import build_loader
from millrace.data.prepare import PrepareConfig, prepare
from millrace.launch.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    lines = [json.dumps({"text": f"the mill turns {n} times " * (1 + n % 7)}) + "\n" for n in range(60)]
    (folder / "mill.jsonl").write_text("".join(lines))
    prepare(PrepareConfig(inputs=[str(folder / "mill.jsonl")], out=str(folder / "out"), vocab_size=300))
    return folder / "out"


def arguments(corpus: Path) -> list[str]:
    return [f"data.manifest={corpus}", "data.sequence_length=32", "train.batch=4", "train.micro_batch=2"]


def test_peek_shows_what_the_loader_gives(corpus: Path, capsys: Capture) -> None:
    assert main(["data", "peek", *arguments(corpus), "--step", "3", "--rows", "4"]) == 0
    shown = capsys.readouterr().out
    config = DataConfig(manifest=str(corpus), sequence_length=32)
    with build_loader(config, seed=0, batch_rows=4, micro_batch=4, rank=0, world=1) as loader:
        batch = [next(loader) for _ in range(3)][-1]
    (micro,) = batch.micro_batches
    for row in range(4):
        assert shown.count(f"━━ row {row}: {len(micro.spans[row])} documents") == 1
    for sample, start, end in batch.spans:
        assert f"── sample {sample}, positions {start}–{end}" in shown
    assert f"step 3: {len(batch.spans)} spans, {batch.local_tokens} targets" in shown and "the mill turns" in shown


def test_peek_names_media_and_saves_them(tmp_path: Path, capsys: Capture) -> None:
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    with tarfile.open(tmp_path / "pics.tar", "w") as tar:
        for name, raw in (("a.png", png.getvalue()), ("a.txt", b"a grey square")):
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    command = ["prepare", str(tmp_path / "pics.tar"), "--text", "txt", "--image", "png", "--vocab-size", "280"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    options = ["train.batch=1", "train.micro_batch=1", "--images", str(tmp_path / "saved")]
    assert main(["data", "peek", f"data.manifest={tmp_path / 'out'}", *options]) == 0
    assert "⟨image: 1 positions⟩a grey square" in capsys.readouterr().out
    (saved,) = (tmp_path / "saved").iterdir()
    assert saved.name == "row0-sample0.png"
    np.testing.assert_array_equal(np.asarray(Image.open(saved)), pixels)


def test_peek_shows_no_padding_for_text(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"stone number {n}"}) + "\n" for n in range(8)))
    assert main(["prepare", str(path), "--out", str(tmp_path / "out"), "--vocab-size", "280"]) == 0
    path.write_text(path.read_text().replace("number 3", "nvmber 3"))
    capsys.readouterr()
    options = ["train.batch=1", "train.micro_batch=1", "data.sequence_length=512"]
    assert main(["data", "peek", f"data.manifest={tmp_path / 'out'}", *options]) == 0
    shown = capsys.readouterr().out
    assert "bad: sample 3 of" in shown and shown.count("⟨left empty⟩") == 1 and shown.count("endoftext") == 7


def test_samples_that_no_row_holds_are_counted(tmp_path: Path, capsys: Capture) -> None:
    with tarfile.open(tmp_path / "pics.tar", "w") as tar:
        for number in range(4):
            png = io.BytesIO()
            Image.new("RGB", (160 if number else 640, 160)).save(png, "PNG")
            for name, raw in ((f"{number}.png", png.getvalue()), (f"{number}.txt", b"grey")):
                member = tarfile.TarInfo(name)
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))
    command = ["prepare", str(tmp_path / "pics.tar"), "--text", "txt", "--image", "png", "--vocab-size", "280"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["data", "stat", f"data.manifest={tmp_path / 'out'}", "data.sequence_length=128"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "1 samples (25.0%) cost more positions than a row has" in said
    held = 3 * (10 * 10 + 1 + 1) / (4 * 128)  # the caption is one token
    assert f"rows of 128: {held:.1%} of the positions hold a token" in said


def test_stat_and_simulate_say_what_they_found(corpus: Path, capsys: Capture) -> None:
    assert main(["data", "stat", *arguments(corpus), "--tokens", "100k"]) == 0
    said = capsys.readouterr().err
    assert "mill" in said and "100.0%" in said and "positions of a sample" in said and "windows planned" in said
    assert main(["data", "simulate", *arguments(corpus), "--nodes", "2", "--steps", "5"]) == 0
    assert "5 steps on 2 × 1 ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["peek", "--step", "0"], "steps are counted from 1"),
        (["simulate", "--nodes", "3"], "cannot be dealt to 3 ranks"),
        (["stat", "data.manifst=x"], "did you mean 'manifest'"),
        (["stat", "."], "is a folder, not a configuration file; write data.manifest=."),
    ],
)
def test_mistakes_are_named(corpus: Path, capsys: Capture, command: list[str], message: str) -> None:
    name, *rest = command
    assert main(["data", name, *arguments(corpus), *rest]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
