"""Sounds: the length from the header by libsndfile, the samples as one channel of float32, FLAC by dr_flac.

dr_flac (through miniaudio) gives the values that libsndfile gives, in about half the time.

Errors are `ValueError`s whose message is the reason, fit for a `BadSample`.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import soundfile

FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
MAX_VALUES = 64 * 2**20  # of all channels: 24 minutes of 48 kHz mono


def length(raw: bytes, max_values: int = MAX_VALUES) -> tuple[int, int, int]:
    """(frames, frames per second, channels), from the header.

    Raises:
        ValueError: not a sound of `FORMATS`, or more than `max_values` = frames · channels.
    """
    with _open(raw, max_values) as file:
        return file.frames, file.samplerate, file.channels


def decode(raw: bytes, max_values: int = MAX_VALUES) -> np.ndarray:
    """The mean of the channels, float32 of shape (frames,), nominally in [-1, 1], at the sound's own rate.

    A WAV or Ogg file that was cut short gives what is there: its header does not bind libsndfile.

    Raises:
        ValueError: not a sound of `FORMATS`, more than `max_values`, cut short or damaged.
    """
    if (decoded := _decode_flac(raw, max_values)) is not None:
        return decoded
    with _open(raw, max_values) as file:
        try:
            values = file.read(dtype="float32", always_2d=True)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"a damaged {file.format} sound: {_reason(error)}") from None
        if len(values) != file.frames:
            raise ValueError(f"a damaged {file.format} sound: {len(values)} frames, its header says {file.frames}")
    return _mono(values)


def _decode_flac(raw: bytes, max_values: int) -> np.ndarray | None:
    """The same for a FLAC file; None where it is another, or not perfect: libsndfile is the judge of those."""
    if raw[:4] != b"fLaC":
        return None
    import miniaudio

    try:
        info = miniaudio.flac_get_info(raw)
        if not 0 < info.num_frames * info.nchannels <= max_values:
            return None
        sound = miniaudio.flac_read_f32(raw)
    except miniaudio.DecodeError:
        return None
    values = np.frombuffer(sound.samples, np.float32).reshape(-1, info.nchannels)
    return _mono(values) if len(values) == info.num_frames else None


def _mono(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values[:, 0]) if values.shape[1] == 1 else values.mean(axis=1)


def _open(raw: bytes, max_values: int) -> soundfile.SoundFile:
    import soundfile

    try:
        file = soundfile.SoundFile(io.BytesIO(raw))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"not a sound that can be read: {_reason(error)}") from None
    why = None
    if file.format not in FORMATS:
        why = f"a sound of format {file.format}, not {', '.join(FORMATS)}"
    elif file.frames < 1:
        why = f"a {file.format} sound without frames"
    elif file.frames * file.channels > max_values:
        why = f"a sound of {file.frames} frames and {file.channels} channels, more than {max_values} values"
    if why:
        file.close()
        raise ValueError(why)
    return file


def _reason(error: Exception) -> str:
    """What libsndfile said, without the address of our buffer."""
    return str(getattr(error, "error_string", error))
