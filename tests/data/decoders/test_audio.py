from __future__ import annotations

import contextlib
import io
import struct
import wave

import numpy as np
import pytest
import soundfile

from millrace.data.decoders.audio import decode, length

TONE = (np.sin(np.arange(3200) / 20) * 0.5).astype(np.float32)
STEREO = np.stack([TONE, TONE * 0.5], axis=1)


def encode(values: np.ndarray, form: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, values, 16000, format=form, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(
    ("form", "subtype", "tolerance"),
    [("WAV", "PCM_16", 2**-15), ("WAV", "FLOAT", 0), ("WAVEX", "PCM_24", 2**-23), ("FLAC", "PCM_16", 2**-15)],
)
def test_samples_come_back_as_one_channel(form: str, subtype: str, tolerance: float) -> None:
    for values, channels in ((TONE, 1), (STEREO, 2)):
        raw = encode(values, form, subtype)
        assert length(raw) == (3200, 16000, channels)
        expected = values if channels == 1 else values.mean(axis=1)
        assert decode(raw).dtype == np.float32 and decode(raw).shape == (3200,)
        assert np.abs(decode(raw) - expected).max() <= tolerance


@pytest.mark.parametrize("form", ["OGG", "MP3"])
def test_lossy_formats(form: str) -> None:
    raw = encode(TONE, form)
    frames, rate, channels = length(raw)
    assert (rate, channels) == (16000, 1) and decode(raw).shape == (frames,)
    assert abs(frames - 3200) < 2000 and np.corrcoef(decode(raw)[:3200], TONE[:frames])[0, 1] > 0.95


def test_samples_are_those_of_another_reader() -> None:
    raw = encode(STEREO, "WAV", "PCM_16")
    with wave.open(io.BytesIO(raw)) as file:
        ints = np.frombuffer(file.readframes(3200), "<i2").reshape(-1, 2)
    assert np.allclose(decode(raw), (ints / 2**15).mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_flac_is_what_libsndfile_decodes(subtype: str, channels: int) -> None:
    values = np.random.default_rng(channels).normal(0, 0.1, (9000, channels)).cumsum(0)
    raw = encode((values / np.abs(values).max() / 1.01).astype(np.float32), "FLAC", subtype)
    expected = soundfile.read(io.BytesIO(raw), dtype="float32", always_2d=True)[0]
    assert np.array_equal(decode(raw), expected[:, 0] if channels == 1 else expected.mean(axis=1))


def claim(raw: bytes, frames: int) -> bytes:
    """A FLAC whose header says that it has `frames` frames (the last 36 bits of bytes 18 to 25)."""
    bits = int.from_bytes(raw[18:26])
    return raw[:18] + (bits >> 36 << 36 | frames).to_bytes(8) + raw[26:]


def test_a_length_above_the_limit_is_refused_from_the_header() -> None:
    raw = encode(TONE, "FLAC")
    for call in (length, decode):
        with pytest.raises(ValueError, match="more than 67108864 values"):
            call(claim(raw, 2**36 - 1))
        with pytest.raises(ValueError, match="3200 frames and 2 channels, more than 6399 values"):
            call(encode(STEREO, "WAV"), 6399)
    assert decode(encode(STEREO, "WAV"), 6400).shape == (3200,)


def test_a_header_that_promises_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match="a damaged FLAC sound"):
        decode(claim(encode(TONE, "FLAC"), 10**6))


@pytest.mark.parametrize("form", ["FLAC", "MP3"])
def test_a_sound_cut_anywhere_is_refused(form: str) -> None:
    raw = encode(TONE, form)
    for cut in [*range(0, len(raw), len(raw) // 40), len(raw) - 1]:
        with pytest.raises(ValueError, match="sound"):
            decode(raw[:cut])


@pytest.mark.parametrize("form", ["WAV", "OGG"])
def test_a_sound_that_libsndfile_shortens_is_shorter_or_refused(form: str) -> None:
    raw = encode(TONE, form)
    for cut in range(0, len(raw), len(raw) // 40):
        with contextlib.suppress(ValueError):
            assert 0 < len(decode(raw[:cut])) < 3200


def test_flipped_bits_raise_nothing_else_than_a_value_error() -> None:
    for form in ("WAV", "FLAC", "OGG"):
        raw = encode(TONE, form)
        for bit in range(0, 8 * min(len(raw), 600), 13):
            damaged = bytearray(raw)
            damaged[bit // 8] ^= 1 << bit % 8
            for call in (length, decode):
                with contextlib.suppress(ValueError):
                    call(bytes(damaged), 10**6)


def test_what_is_no_sound_is_refused() -> None:
    for raw in (b"", b"not a sound", b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WAVE"):
        with pytest.raises(ValueError, match="not a sound that can be read"):
            decode(raw)
    with pytest.raises(ValueError, match="a sound of format AIFF, not WAV, WAVEX, FLAC"):
        length(encode(TONE, "AIFF"))
    with pytest.raises(ValueError, match="a WAV sound without frames"):
        decode(encode(TONE[:0], "WAV"))
