"""The demo's pictures: glyphs that Pillow draws from its own font, with the names that Unicode gives them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from millrace.eval.media import png

SIDE = 24  # pixels
_FONT = 20  # points
_SHIFT = 1  # pixels by which samples are moved, at most
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def name_of(character: str) -> str:
    """What Unicode calls it, such as "digit seven"."""
    return unicodedata.name(character).lower()


def draw(character: str, random: np.random.Generator | None = None) -> np.ndarray:
    """A glyph in its picture's middle, uint8 (SIDE, SIDE, 3), black on white; with `random` moved, in other greys."""
    from PIL import Image, ImageDraw, ImageFont

    ink, ground, left, top = 0, 255, 0, 0
    if random is not None:
        ink, ground = int(random.integers(0, 40)), int(random.integers(216, 256))
        left, top = random.integers(-_SHIFT, _SHIFT + 1, 2).tolist()
    picture = Image.new("L", (SIDE, SIDE), ground)
    middle = (SIDE / 2 + left, SIDE / 2 + top)
    font = ImageFont.load_default(size=_FONT)
    ImageDraw.Draw(picture).text(middle, character, fill=ink, font=font, anchor="mm")
    return np.repeat(np.asarray(picture)[:, :, None], 3, 2)


def samples(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` rows {"image": PNG, "text": name}, the characters in turn."""
    random = np.random.default_rng(seed)
    for number in range(count):
        character = CHARACTERS[number % len(CHARACTERS)]
        yield {"image": png(draw(character, random)), "text": name_of(character)}


def nearest(pictures: Sequence[np.ndarray]) -> list[str]:
    """The names of the real glyphs that pictures, uint8 (SIDE, SIDE, 3), are most like wherever they stand.

    This judge knows no model.
    """
    known = [(name_of(character), _everywhere(_ink(draw(character)))) for character in CHARACTERS]
    found = []
    for picture in pictures:
        ink = _ink(picture)
        found.append(min(known, key=lambda one: _distances(ink, one[1]).min())[0])
    return found


def _ink(pixels: np.ndarray) -> np.ndarray:
    """How much darker than the ground each pixel is, 0 to 1, (SIDE, SIDE)."""
    grey = pixels.mean(2)
    ground, dark = np.percentile(grey, 90), grey.min()
    return np.clip((ground - grey) / max(ground - dark, 1.0), 0, 1)


def _everywhere(ink: np.ndarray) -> np.ndarray:
    """An ink moved to every place that samples have, and one beyond, (places, SIDE, SIDE)."""
    most = _SHIFT + 1
    wide = np.pad(ink, most)
    places = range(2 * most + 1)
    return np.stack([wide[top : top + SIDE, left : left + SIDE] for top in places for left in places])


def _distances(ink: np.ndarray, places: np.ndarray) -> np.ndarray:
    """From 0, equal, to 1, nothing in common, for each place."""
    return np.abs(places - ink).sum((1, 2)) / np.maximum(np.maximum(places, ink).sum((1, 2)), 1e-9)
