"""Samples in training: answers in every modality, kept beside the ledger and shown in the report."""

from __future__ import annotations

import base64
import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from millrace.core.errors import UserError
from millrace.core.ledger import Ledger
from millrace.core.rundir import RunDir
from millrace.eval.any_to_any import AnyToAny
from millrace.eval.decoding import Sampling
from millrace.eval.report import write_report
from millrace.pretrain.objectives.showing import Shown
from millrace.pretrain.samples import kept
from tests.eval.test_any_to_any import png, run, step, wav

__all__ = ["run", "step"]  # fixtures


@pytest.fixture
def entries(run: AnyToAny, tmp_path: Path) -> list[dict[str, Any]]:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "b.wav").write_bytes(wav(0))
    prompts = ["the mill", f"image={tmp_path / 'a.png'}", f"audio={tmp_path / 'b.wav'}"]
    return Shown(run, prompts, Sampling(guidance=1.0))()


def test_words_become_media_and_files_words(run: AnyToAny, entries: list[dict[str, Any]]) -> None:
    """The fixture's templates: image > text, text > image, audio > text image, text."""
    assert [(entry["to"], sorted(entry.get("files", {}))) for entry in entries] == [
        ("image", ["made.png"]), ("text", ["given.png"]), ("text", ["given.wav"]),
    ]  # fmt: skip
    made = np.asarray(Image.open(io.BytesIO(entries[0]["files"]["made.png"])))
    (expected,) = run.generate([{"text": "the mill"}], "image", Sampling(guidance=1.0))
    assert np.array_equal(made, expected)
    given = np.asarray(Image.open(io.BytesIO(entries[1]["files"]["given.png"])))
    assert np.array_equal(given, run.media["image"].given(png(0)).numpy())
    with wave.open(io.BytesIO(entries[2]["files"]["given.wav"])) as file:
        assert (file.getnframes(), file.getframerate()) == (400, 8000)
    assert isinstance(entries[1]["text"], str)


def test_they_are_kept_beside_the_ledger_and_shown(entries: list[dict[str, Any]], tmp_path: Path) -> None:
    rundir = RunDir(tmp_path / "run")
    rundir.path.mkdir()
    with Ledger(rundir.ledger) as ledger:
        ledger.append("start", run_id="r", resumed_from=None)
        for number, entry in enumerate(entries):
            ledger.append("sample", step=50, **kept(rundir, 50, number, entry, main=True))
    page = write_report(rundir.path).read_text()
    for number, (entry, tag) in enumerate(zip(entries, ("<img", "<img", "<audio controls"), strict=True)):
        (name, content), *_ = entry["files"].items()
        path = rundir.path / "samples" / "step-00000050" / f"{number:02d}-{name}"
        assert path.read_bytes() == content
        assert tag in page and base64.b64encode(content).decode() in page
    path.unlink()
    assert "02-given.wav is gone" in write_report(rundir.path).read_text()


def test_other_ranks_write_nothing(entries: list[dict[str, Any]], tmp_path: Path) -> None:
    found = kept(RunDir(tmp_path / "run"), 50, 0, entries[0], main=False)
    assert found["files"] == {"made.png": "samples/step-00000050/00-made.png"} and not (tmp_path / "run").exists()


def test_mistakes_are_told_at_once(run: AnyToAny, tmp_path: Path) -> None:
    for prompt, why in ((f"image={tmp_path / 'none.png'}", "none.png cannot be read"), ("mill " * 60, "shorten the")):
        with pytest.raises(UserError, match=why):
            Shown(run, [prompt], Sampling())
