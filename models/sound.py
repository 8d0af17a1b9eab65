"""Log-mel spectrograms of sounds, computed where the model is. B sounds, F frames, H hops, M mel bands."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from millrace.models.config import MelConfig

_QUIET = 1e-4  # magnitude of which less is silence
_LEAST = 1e-12  # by which is divided
_MOMENTUM = 0.99  # of Griffin and Lim's rounds
_WINDOWS = (64, 128, 256, 512, 1024, 2048)


def mel_filters(config: MelConfig) -> Tensor:
    """Triangles (M, window // 2 + 1) of equal width on the mel scale (O'Shaughnessy's, as HTK has it), float32."""
    edges_mel = np.linspace(0.0, _mel(config.rate / 2), config.bands + 2)
    edges = 700 * (10 ** (edges_mel / 2595) - 1)
    bins = np.linspace(0, config.rate / 2, config.window // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return torch.from_numpy(np.maximum(0, np.minimum(rising, falling)).astype(np.float32))


def _mel(hertz: float) -> float:
    return 2595 * float(np.log10(1 + hertz / 700))


def spectral_distance(a_BF: Tensor, b_BF: Tensor) -> Tensor:
    """Mean distance (B,) of magnitudes and of their logarithms between two sounds' spectra, at six scales.

    After Parallel WaveGAN (Yamamoto et al., https://arxiv.org/abs/1910.11480, section 2.2), with absolute magnitudes
    as in SoundStream; windows longer than the sound are left out.
    """
    total, count = torch.zeros(len(a_BF), device=a_BF.device), 0
    for size in _WINDOWS:
        if size > a_BF.shape[1]:
            break
        window = torch.hann_window(size, device=a_BF.device)
        a, b = (
            torch.stft(each.float(), size, size // 4, window=window, center=False, return_complex=True).abs()
            / window.sum()
            for each in (a_BF, b_BF)
        )
        near = (a - b).abs() + ((a + _QUIET).log10() - (b + _QUIET).log10()).abs()
        total, count = total + near.flatten(1).mean(1), count + 1
    return total / max(count, 1)


class LogMel(nn.Module):
    """log10 of the energy in mel bands, float32 (B, M, H), of sounds float32 (B, F)."""

    filters: Tensor
    window: Tensor

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        self.config = config
        for name, value in self.constants().items():
            self.register_buffer(name, value, persistent=False)

    def constants(self) -> dict[str, Tensor]:
        """The buffers."""
        return {"filters": mel_filters(self.config), "window": torch.hann_window(self.config.window)}

    def forward(self, sound_BF: Tensor) -> Tensor:
        """Windows are centred on hops, with silence on both sides."""
        half = self.config.window // 2
        padded = F.pad(sound_BF.float(), (half, half))
        spectrum = torch.stft(
            padded, self.config.window, self.config.hop, window=self.window.float(), center=False, return_complex=True
        )
        energy_BMH = self.filters.float() @ spectrum.abs().square()
        return energy_BMH.clamp(min=self.config.floor).log10()

    @torch.no_grad()
    def invert(self, bands_BMH: Tensor, rounds: int = 60) -> Tensor:
        """Sounds float32 (B, F) whose bands are near the given ones, F = (H - 1) hops.

        Energies of frequencies come by the rule of Lee and Seung (https://doi.org/10.1038/44565), phases by that of
        Griffin and Lim (https://doi.org/10.1109/TASSP.1984.1164317), quickened as by Perraudin et al.
        (https://doi.org/10.1109/WASPAA.2013.6701851). They begin at 0, so that the same bands make the same sound.
        """
        window, hop, frames = self.window.float(), self.config.hop, (bands_BMH.shape[2] - 1) * self.config.hop
        filters, wanted = self.filters.float(), 10 ** bands_BMH.float()
        energy, total = filters.T @ wanted, filters.sum(0)[:, None].clamp(min=_LEAST)
        for _ in range(rounds):
            energy = energy * (filters.T @ (wanted / (filters @ energy).clamp(min=_LEAST))) / total
        magnitude = energy.sqrt()

        def sound(spectrum: Tensor) -> Tensor:
            return torch.istft(spectrum, self.config.window, hop, window=window, length=frames)

        guess = magnitude.to(torch.complex64)
        before = torch.zeros_like(guess)
        for _ in range(rounds):
            seen = torch.stft(
                sound(guess), self.config.window, hop, window=window, pad_mode="constant", return_complex=True
            )
            moved = seen + _MOMENTUM * (seen - before)
            guess, before = magnitude * moved / moved.abs().clamp(min=_LEAST), seen
        return sound(guess)
