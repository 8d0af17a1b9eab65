"""Log-mel spectrograms against those of transformers' numpy code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from millrace.models.config import MelConfig
from millrace.models.sound import LogMel, mel_filters


@pytest.mark.parametrize("config", [MelConfig(), MelConfig(rate=8000, window=256, hop=128, bands=32)])
def test_equals_transformers(config: MelConfig) -> None:
    bank = mel_filter_bank(config.window // 2 + 1, config.bands, 0.0, config.rate / 2, config.rate, mel_scale="htk")
    np.testing.assert_allclose(mel_filters(config).numpy(), bank.T, atol=1e-6)
    sound = np.random.default_rng(0).standard_normal(config.rate // 2).astype(np.float32)
    expected = spectrogram(
        sound, window_function(config.window, "hann"), config.window, config.hop, power=2.0, center=True,
        pad_mode="constant", mel_filters=bank, mel_floor=config.floor, log_mel="log10",
    )  # fmt: skip
    found = LogMel(config)(torch.from_numpy(sound)[None])[0]
    assert found.shape == (config.bands, config.hops(len(sound))) == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


def test_silence_is_the_floor() -> None:
    assert (LogMel(MelConfig())(torch.zeros(1, 1600)) == -5).all()


def test_inverted_bands_have_the_same_bands() -> None:
    config = MelConfig(rate=8000, window=256, hop=128, bands=32)
    mel, seconds = LogMel(config), torch.arange(4000) / 8000
    fade = torch.linspace(1, 0.1, 4000)
    sounds = torch.stack([fade * torch.sin(6.2832 * (hertz + 200 * seconds) * seconds) for hertz in (300, 900, 2000)])
    bands = mel(sounds)
    made = mel.invert(bands)
    assert made.shape == (3, 128 * (bands.shape[2] - 1)) and torch.equal(made, mel.invert(bands))
    loud = bands > bands.amax((1, 2), keepdim=True) - 3
    near, without_phases = ((mel(mel.invert(bands, rounds)) - bands)[loud].abs().mean() for rounds in (60, 1))
    assert near < 0.05 and near < without_phases / 5
