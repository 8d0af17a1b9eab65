"""Sounds: float32 of shape (frames,), one channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from millrace.core.config import option
from millrace.data.decoders import audio
from millrace.data.modalities.base import Modality


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioCost:
    """Hops of a sound, one position each; the last may be cut short."""

    hop_ms: int = option(20, "milliseconds of sound that make a position")

    def __post_init__(self) -> None:
        if self.hop_ms < 1:
            raise ValueError(f"costs.audio.hop_ms = {self.hop_ms} must be at least 1")

    def positions(self, raw: bytes) -> int:
        """Positions of an encoded sound; raises `ValueError` where its header cannot be read."""
        frames, rate, _ = audio.length(raw)
        if frames < 0 or rate < 1:
            raise ValueError(f"its header says {frames} frames at {rate} Hz")
        return -(-frames * 1000 // (rate * self.hop_ms))


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioView:
    """A piece of a sound at a given rate, altered at random or not."""

    role: Literal["audio"] = option("audio", "of which modality")
    name: str = option("audio", "what batches call it")
    count: int = option(1, "pieces of this kind; NAME0, NAME1, … where there are several")
    rate: int = option(16000, "frames of a second; a sound of another rate is resampled")
    seconds: float = option(0.0, "length; longer sounds are cut, shorter ones followed by silence; 0: as they are")
    anywhere: bool = option(False, "a longer sound is cut, and a shorter one begins, at a random place")
    gain: float = option(0.0, "decibels that it may be louder or softer by")
    noise: float | None = option(None, "decibels by which white noise is softer, at least; none if absent")

    def __post_init__(self) -> None:
        if self.rate < 1 or self.count < 1:
            raise ValueError(f"rate = {self.rate} and count = {self.count} must be at least 1")
        if self.seconds < 0 or self.gain < 0:
            raise ValueError(f"seconds = {self.seconds} and gain = {self.gain} must not be negative")

    def make(self, value: np.ndarray, raw: bytes, random: np.random.Generator) -> np.ndarray:
        """Piece (seconds · rate,) of a sound (frames,), float32."""
        _, rate, _ = audio.length(raw)
        value = resample(value, rate, self.rate)
        if self.seconds:
            value = _cut(value, round(self.seconds * self.rate), random if self.anywhere else None)
        if self.gain:
            value = value * np.float32(10 ** (random.uniform(-self.gain, self.gain) / 20))
        if self.noise is not None:
            loudness = np.sqrt(np.square(value, dtype=np.float64).mean()) * 10 ** (-self.noise / 20) * random.random()
            value = value + (loudness * random.standard_normal(len(value))).astype(np.float32)
        return np.ascontiguousarray(value, np.float32)

    def blank(self) -> np.ndarray:
        """Silence, of no length where pieces have none in common."""
        return np.zeros(round(self.seconds * self.rate), np.float32)


def resample(value: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """A sound (frames,) at another rate, float32 (ceil(frames · wanted / rate),): exact for what both rates can hold.

    By its Fourier series, as `scipy.signal.resample` does, with silence behind it so that its end does not ring at its
    start.
    """
    if rate == wanted:
        return value
    frames = len(value)
    count = -(-frames * wanted // rate)
    unit = rate // int(np.gcd(rate, wanted))  # lengths in the ratio of the rates, so that the pitch stays
    padded = unit * _smooth(-(-(frames + frames // 8 + 64) // unit))
    spectrum = np.fft.rfft(value, padded)
    made = np.fft.irfft(spectrum[: padded * wanted // rate // 2 + 1], padded * wanted // rate) * (wanted / rate)
    return made[:count].astype(np.float32)


def _smooth(number: int) -> int:
    """A number at least as large, a multiple of a power of two near its square root: quick to transform."""
    power = 1 << (number.bit_length() // 2)
    return -(-number // power) * power


def _cut(value: np.ndarray, length: int, random: np.random.Generator | None) -> np.ndarray:
    room = abs(len(value) - length)
    start = int(random.integers(0, room + 1)) if random is not None else 0
    if len(value) >= length:
        return value[start : start + length]
    return np.pad(value, (start, length - len(value) - start))


class AudioModality(Modality):
    """Encoded sounds, as libsndfile and dr_flac read them."""

    cost, view = AudioCost, AudioView

    def decode(self, raw: bytes) -> np.ndarray:
        return audio.decode(raw)

    def blank(self) -> np.ndarray:
        return np.empty(0, np.float32)
