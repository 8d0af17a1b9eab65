"""Pictures and sounds as files."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np


def png(picture: np.ndarray) -> bytes:
    """A picture, uint8 (height, width, 3), or grey (height, width), encoded."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def wav(sound: np.ndarray, rate: int) -> bytes:
    """A sound, float32 (frames,), as 16-bit PCM; what is louder than 1 is cut."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, rate, len(sound), "NONE", ""))
        file.writeframes((np.clip(sound, -1, 1) * 32767).round().astype("<i2").tobytes())
    return out.getvalue()


def save(stem: Path, made: str | np.ndarray, rate: int) -> Path:
    """Write a text, a picture or a sound of `rate` beside `stem`, with its suffix; the path."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(made, str):
        path = stem.with_suffix(".txt")
        path.write_text(made, encoding="utf-8")
        return path
    path = stem.with_suffix(".wav" if made.ndim == 1 else ".png")
    path.write_bytes(wav(made, rate) if made.ndim == 1 else png(made))
    return path
