"""The payloads: text, its tokens, JPEGs and FLAC clips, a pure function of (kind, sample, seed).

They lie in one plain file per modality, `raw/payload.bin` with `raw/offsets.npy`, from which every format is written.
Sample i has id i; samples are sorted by class, i · CLASSES // n, so that a poor shuffle shows in the labels of a batch.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

SIZES = {"text": 200_000, "tokens": 200_000, "images": 8_000, "audio": 2_000}
CLASSES, SHARDS, SEED = 10, 32, 0
VOCABULARY = 8192
_WORDS = 30_000


def count(modality: str, scale: float) -> int:
    """Samples of a modality: whole thousands, at least two."""
    return max(2000, round(SIZES[modality] * scale / 1000) * 1000)


def labels(samples: int) -> np.ndarray:
    """The class of every sample, int64, ascending."""
    return np.arange(samples, dtype=np.int64) * CLASSES // samples


def _random(kind: int, sample: int) -> np.random.Generator:
    return np.random.default_rng((SEED, kind, sample))


@cache
def _words() -> tuple[np.ndarray, np.ndarray]:
    """Made-up words of one to five syllables, and their shares by Zipf's law."""
    draw = _random(0, 0)
    syllables = [c + v + e for c in "bcdfghklmnprstvw" for v in "aeiou" for e in ("", "n", "r", "s", "t", "ll")]
    words = ["".join(draw.choice(syllables, n)) for n in draw.integers(1, 6, _WORDS)]
    share = 1 / np.arange(2.7, _WORDS + 2.7)
    return np.array(words, object), np.cumsum(share / share.sum())


def text(sample: int) -> bytes:
    """A document whose number of words is log-normal (median 60, mean 100), as UTF-8."""
    words, share = _words()
    draw = _random(1, sample)
    length = 1 + int(draw.lognormal(np.log(60), 1.0))
    chosen = words[np.minimum(np.searchsorted(share, draw.random(length)), _WORDS - 1)]
    ends = np.flatnonzero(draw.random(length) < 0.08)
    chosen[ends] += np.where(draw.random(len(ends)) < 0.5, ",", ".").astype(object)
    return " ".join(chosen.tolist()).encode()


@cache
def _fields() -> np.ndarray:
    """Noise whose amplitude falls with the spatial frequency, as in photographs; shape (6, 512, 512)."""
    draw = _random(2, 0)
    frequency = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(draw.standard_normal((6, 512, 512))) / frequency**1.1
    field = np.fft.irfft2(spectrum, s=(512, 512))
    return (field / field.std((1, 2), keepdims=True)).astype(np.float32)


def image(sample: int) -> bytes:
    """A JPEG of 256 × 256 pixels and about 20 kB."""
    from PIL import Image

    draw = _random(3, sample)
    at = draw.integers(0, 256, (4, 2))
    fields = np.stack(
        [_fields()[n, y : y + 256, x : x + 256] for n, (y, x) in zip(draw.integers(0, 6, 4), at, strict=True)]
    )
    mixed = np.tensordot(fields, draw.normal(0, 1, (4, 3)).astype(np.float32), axes=(0, 0))
    fine = draw.standard_normal((256, 256, 1), np.float32)
    pixels = np.clip(128 + 22 * mixed + 4 * fine, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=80)
    return file.getvalue()


def audio(sample: int) -> bytes:
    """A FLAC clip: 4 s at 16 kHz of a voice-like sum of harmonics that come and go, with noise."""
    import soundfile

    draw = _random(4, sample)
    time = np.arange(64_000, dtype=np.float32) / 16_000
    pitch = 2 * np.pi * np.cumsum(draw.uniform(90, 250) * (1 + 0.1 * np.sin(2 * np.pi * 0.7 * time))) / 16_000
    voice = np.zeros_like(time)
    for harmonic in range(1, 12):
        swell = np.interp(time, np.linspace(0, 4, 24), draw.random(24)) ** 2
        voice += swell * np.sin(harmonic * pitch) / harmonic
    sound = 0.2 * voice + 0.004 * draw.standard_normal(64_000)
    file = io.BytesIO()
    soundfile.write(file, np.clip(sound, -1, 1).astype(np.float32), 16_000, format="FLAC", subtype="PCM_16")
    return file.getvalue()


MAKERS: dict[str, Callable[[int], bytes]] = {"text": text, "images": image, "audio": audio}


def make_raw(modality: str, samples: int, folder: Path, encode: Callable[[list[str]], list[np.ndarray]]) -> None:
    """Write `folder/raw`, unless it is there; `encode` tokenises texts."""
    target = folder / "raw"
    if target.exists():
        return
    if modality == "tokens":
        payloads: Iterable[bytes] = _tokens(samples, encode)
    else:
        payloads = (MAKERS[modality](sample) for sample in range(samples))
    temporary = folder / ".raw"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    offsets = [0]
    with open(temporary / "payload.bin", "wb") as file:
        for payload in payloads:
            file.write(payload)
            offsets.append(offsets[-1] + len(payload))
    np.save(temporary / "offsets.npy", np.array(offsets, np.int64))
    temporary.rename(target)


def _tokens(samples: int, encode: Callable[[list[str]], list[np.ndarray]]) -> Iterator[bytes]:
    for start in range(0, samples, 1000):
        texts = [text(sample).decode() for sample in range(start, min(start + 1000, samples))]
        yield from (ids.astype(np.uint16).tobytes() for ids in encode(texts))


class Raw:
    """Payloads of a folder that `make_raw` wrote, in memory: `raw[i]` gives bytes."""

    def __init__(self, folder: Path) -> None:
        self.data = np.fromfile(folder / "raw" / "payload.bin", np.uint8)
        self.offsets = np.load(folder / "raw" / "offsets.npy")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, sample: int) -> bytes:
        return self.data[self.offsets[sample] : self.offsets[sample + 1]].tobytes()
