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
