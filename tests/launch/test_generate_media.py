"""`millrace generate --to …`, as a user types it."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from millrace.eval.any_to_any import AnyToAny
from millrace.eval.decoding import Sampling
from millrace.launch.cli import main
from tests.eval.test_any_to_any import png, run, step, wav

__all__ = ["run", "step"]  # fixtures


def test_pictures_and_sounds_become_files(run: AnyToAny, step: Path, tmp_path: Path) -> None:
    command = ["generate", str(step), "--prompt", "the", "--prompt", "mill", "--guidance", "1", "--seed", "4"]
    how, prompts = Sampling(guidance=1.0, seed=4), [{"text": "the"}, {"text": "mill"}]
    assert main([*command, "--to", "image", "--out", str(tmp_path / "pictures")]) == 0
    assert main([*command, "--to", "audio", "--out", str(tmp_path / "sounds")]) == 0
    for number, expected in enumerate(run.generate(prompts, "image", how)):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "pictures" / f"{number:04d}.png")), expected)
    for number, expected in enumerate(run.generate(prompts, "audio", how)):
        with wave.open(str(tmp_path / "sounds" / f"{number:04d}.wav")) as file:
            assert file.getframerate() == 8000
            written = np.frombuffer(file.readframes(-1), "<i2") / 32767
        assert np.allclose(written, expected.clip(-1, 1), atol=1 / 32767)


def test_files_are_answered_in_words(
    run: AnyToAny, step: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "b.png").write_bytes(png(1))
    (tmp_path / "c.wav").write_bytes(wav(0))
    images = ["--image", str(tmp_path / "a.png"), "--image", str(tmp_path / "b.png")]
    assert main(["generate", str(step), *images, "--temperature", "0"]) == 0
    expected = run.generate([{"image": png(0)}, {"image": png(1)}], "text", Sampling(temperature=0.0))
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected)
    both = ["--audio", str(tmp_path / "c.wav"), *images]
    assert main(["generate", str(step), *both, "--to", "image", "--out", str(tmp_path / "made")]) == 0
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["0000.png", "0001.png"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--to", "image", "--prompt", "a"], "say into which folder with --out"),
        (["--to", "text", "--image", "none.png"], "none.png cannot be read"),
        (
            ["--to", "text", "--prompt", "a", "--prompt", "b", "--image", "A", "--image", "A", "--image", "A"],
            "no batch",
        ),
        (["--to", "smell", "--prompt", "a", "--out", "x"], "the model has no smell"),
    ],
)
def test_mistakes(step: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], why: str) -> None:
    (tmp_path / "A").write_bytes(png(0))
    options = [str(tmp_path / "A") if option == "A" else option for option in options]
    assert main(["generate", str(step), *options]) == 1
    assert why in capsys.readouterr().err.replace("\n", " ")
