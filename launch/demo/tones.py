"""The demo's sounds: the tones that a telephone dials digits with, and a detector that hears them.

Dual-tone multi-frequency signalling (ITU-T Q.23): a digit is two sines at once, one of four low and one of three high
frequencies.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from millrace.eval.media import wav

RATE = 4000  # frames of a second; the highest tone is 1,477 Hz
SECONDS = 0.64
DIGITS = 3  # of a sound
_LOW, _HIGH = (697, 770, 852, 941), (1209, 1336, 1477)
_KEYS = {"1": (0, 0), "2": (0, 1), "3": (0, 2), "4": (1, 0), "5": (1, 1), "6": (1, 2), "7": (2, 0), "8": (2, 1),
         "9": (2, 2), "0": (3, 1)}  # fmt: skip
_TONE, _PAUSE = 0.12, 0.08  # seconds
_LOOK = 0.04  # seconds that the detector listens to at a time: 25 Hz apart
_SHARE = 0.5  # of a look's energy that the two tones must have
_LEAST = 0.1  # that each of them must have
_SILENCE = 0.01  # of the loudest look's energy


def dial(digits: str, random: np.random.Generator | None = None) -> np.ndarray:
    """The sound of some digits, float32 (SECONDS · RATE,); with `random` it begins later, and is louder or softer."""
    room = SECONDS - len(digits) * (_TONE + _PAUSE)
    start, loudness = (0.0, 0.5) if random is None else (room * random.random(), random.uniform(0.25, 0.5))
    made, times = np.zeros(round(SECONDS * RATE)), np.arange(round(_TONE * RATE)) / RATE
    ramp = np.minimum(1, np.minimum(times, times[::-1]) / 0.005)  # without it a tone clicks
    for number, digit in enumerate(digits):
        low, high = _KEYS[digit]
        tone = np.sin(2 * np.pi * _LOW[low] * times) + np.sin(2 * np.pi * _HIGH[high] * times)
        begin = round((start + number * (_TONE + _PAUSE)) * RATE)
        made[begin : begin + len(tone)] += loudness * ramp * tone
    return made.astype(np.float32)


def is_held_out(digits: str) -> bool:
    """Whether a number is kept from training: every tenth, by its checksum."""
    return zlib.crc32(digits.encode()) % 10 == 0


def samples(count: int, seed: int, *, held_out: bool = False) -> Iterator[dict[str, Any]]:
    """`count` rows {"audio": WAV, "text": digits with spaces between} of numbers drawn at random."""
    random = np.random.default_rng(seed)
    while count:
        digits = "".join(map(str, random.integers(0, 10, DIGITS)))
        if is_held_out(digits) == held_out:
            count -= 1
            yield {"audio": wav(dial(digits, random), RATE), "text": " ".join(digits)}


def heard(sound: np.ndarray, rate: int = RATE) -> str:
    """The digits that a sound (frames,) dials, found by Goertzel's filters: a judge that knows no model.

    G. Goertzel, An algorithm for the evaluation of finite trigonometric series, 1958. A digit is heard where one low
    and one high tone have most of the energy, neither alone, and counts once until something else is heard.
    """
    length = round(_LOOK * rate)
    looks = np.lib.stride_tricks.sliding_window_view(np.asarray(sound, np.float64), length)[:: length // 2]
    energy = np.square(looks).sum(1)
    low, high = (np.stack([goertzel(looks, f, rate) for f in tones], 1) for tones in (_LOW, _HIGH))
    pair = np.stack([low.max(1), high.max(1)]) * 2 / length
    tonal = (pair.sum(0) > _SHARE * energy) & (pair.min(0) > _LEAST * energy)
    loud = energy > _SILENCE * max(energy.max(initial=0.0), 1e-9)
    keys = {pair: digit for digit, pair in _KEYS.items()}
    each = [
        keys.get((int(a), int(b)), "") if there else ""
        for a, b, there in zip(low.argmax(1), high.argmax(1), tonal & loud, strict=True)
    ]
    for place in range(1, len(each) - 1):  # a gap of one look is a dropout, no pause
        if not each[place] and each[place - 1] == each[place + 1]:
            each[place] = each[place - 1]
    return "".join(one for before, one in zip(["", *each], each, strict=False) if one != before)


def goertzel(sounds: np.ndarray, frequency: float, rate: int) -> np.ndarray:
    """|sum of x(t) · exp(-2πi · frequency · t / rate)|² of each of `sounds` (N, frames), float64 (N,)."""
    turn = 2 * np.cos(2 * np.pi * frequency / rate)
    before = last = np.zeros(len(sounds))
    for frame in sounds.T:
        before, last = last, frame + turn * last - before
    return np.square(last) + np.square(before) - turn * last * before
