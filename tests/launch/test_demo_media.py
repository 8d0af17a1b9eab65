"""The demo's pictures and sounds, and the judges of what is generated."""

from __future__ import annotations

import io
import wave
from typing import Any

import numpy as np
import pytest
from PIL import Image

from millrace.launch.demo import glyphs, tones
from millrace.launch.demo.media import JUDGED, edits, judge


def test_every_glyph_is_its_own_nearest() -> None:
    random = np.random.default_rng(0)
    drawn = [(glyphs.name_of(c), glyphs.draw(c, random)) for c in glyphs.CHARACTERS for _ in range(3)]
    assert glyphs.nearest([picture for _, picture in drawn]) == [name for name, _ in drawn]
    assert len({name for name, _ in drawn}) == len(glyphs.CHARACTERS)


def test_other_pictures_are_other_glyphs() -> None:
    drawn = np.stack([glyphs.draw(c) for c in glyphs.CHARACTERS])
    names = [glyphs.name_of(c) for c in glyphs.CHARACTERS]
    found = glyphs.nearest(list(np.roll(drawn, 1, 0)))
    assert not any(a == b for a, b in zip(found, names, strict=True))
    blurred = [np.asarray(Image.fromarray(p).resize((12, 12)).resize((24, 24))) for p in drawn]
    assert np.mean([a == b for a, b in zip(glyphs.nearest(blurred), names, strict=True)]) > 0.9


def test_rows_of_glyphs_are_named_and_repeatable() -> None:
    rows = list(glyphs.samples(50, 1))
    assert rows == list(glyphs.samples(50, 1)) != list(glyphs.samples(50, 2))
    assert rows[7]["text"] == "digit seven"
    pictures = [np.asarray(Image.open(io.BytesIO(row["image"]))) for row in rows]
    assert glyphs.nearest(pictures) == [row["text"] for row in rows]


@pytest.mark.parametrize("frequency", [697.0, 1477.0, 1000.0])
def test_goertzel_is_a_fourier_sum(frequency: float) -> None:
    sounds = np.random.default_rng(0).standard_normal((3, 160))
    turns = np.exp(-2j * np.pi * frequency / 4000 * np.arange(160))
    np.testing.assert_allclose(tones.goertzel(sounds, frequency, 4000), np.abs(sounds @ turns) ** 2, rtol=1e-9)


def test_dialled_digits_are_heard() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        digits = "".join(map(str, random.integers(0, 10, tones.DIGITS)))
        sound = tones.dial(digits, random)
        assert tones.heard(sound) == digits
        assert tones.heard(sound + 0.02 * random.standard_normal(len(sound)).astype(np.float32)) == digits


def test_what_is_no_digit_is_not_heard() -> None:
    random = np.random.default_rng(0)
    times = np.arange(2560) / tones.RATE
    for sound in (np.zeros(2560), random.standard_normal(2560), np.sin(2 * np.pi * 697 * times)):
        assert tones.heard(sound) == ""
    assert tones.heard(tones.dial("12")) != "123"
    assert tones.heard(tones.dial("551")) == "551"
    dropout = tones.dial("42")
    dropout[240:320] = 0  # 20 ms inside the first tone
    assert tones.heard(dropout) == "42"


def test_rows_of_tones_are_wav_files() -> None:
    row = next(tones.samples(1, 3))
    with wave.open(io.BytesIO(row["audio"])) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (4000, 1, 2560)
        sound = np.frombuffer(file.readframes(2560), "<i2") / 32768
    assert " ".join(tones.heard(sound)) == row["text"]
    assert list(tones.samples(5, 3)) == list(tones.samples(5, 3)) != list(tones.samples(5, 4))


@pytest.mark.parametrize(
    ("wanted", "found", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("1 2 3", "1 2 3", 0)]
)
def test_edits(wanted: str, found: str, distance: int) -> None:
    assert edits(wanted, found) == edits(found, wanted) == distance


class _Perfect:
    """Makes what is wanted, but for the first of each kind."""

    def generate(self, prompts: list[dict[str, Any]], to: str, how: object) -> list[Any]:
        assert len(prompts) == JUDGED
        if to == "text":
            rows = [*glyphs.samples(JUDGED, 1)] if "image" in prompts[0] else [*tones.samples(JUDGED, 1, held_out=True)]
            return ["nothing", *(row["text"] for row in rows[1:])]
        texts = [prompt["text"] for prompt in prompts]
        if to == "image":
            names = {glyphs.name_of(c): c for c in glyphs.CHARACTERS}
            return [glyphs.draw("M"), *(glyphs.draw(names[text]) for text in texts[1:])]
        return [np.zeros(2560, np.float32), *(tones.dial(text.replace(" ", "")) for text in texts[1:])]


def test_judges_tell_right_from_wrong() -> None:
    found = judge(_Perfect())
    assert [judged.way for judged in found] == ["image to text", "text to image", "audio to text", "text to audio"]
    assert [judged.right for judged in found] == [1 - 1 / JUDGED] * 4
    assert all(judged.errors > 0 for judged in found)


def test_no_number_is_on_both_sides() -> None:
    numbers = [{row["text"] for row in tones.samples(300, 0, held_out=held)} for held in (False, True)]
    assert not numbers[0] & numbers[1]
    assert 5 < len(numbers[1]) < 130
