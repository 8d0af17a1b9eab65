"""Convolutional encoder, decoder and critic, in one dimension or two.

B rows, C channels, S sizes: (frames,) or (height, width).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from millrace.models.conditioning import Words

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d}


def norm(channels: int) -> nn.GroupNorm:
    """By groups, for the statistics of a batch norm would differ between ranks."""
    groups = math.gcd(channels, 32)
    while groups > 1 and channels // groups < 4:  # of one channel they would lose its mean
        groups //= 2
    return nn.GroupNorm(groups, channels)


class Block(nn.Module):
    """Two convolutions beside a straight way."""

    def __init__(self, dimensions: int, channels: int, out: int) -> None:
        super().__init__()
        conv = _CONV[dimensions]
        self.norm1, self.conv1 = norm(channels), conv(channels, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out), conv(out, out, 3, padding=1)
        self.straight = conv(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) → (B, out, *S)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.straight(x) + self.conv2(F.silu(self.norm2(hidden)))


class Encoder(nn.Sequential):
    """The encoder of VQGAN (Esser et al., https://arxiv.org/abs/2012.09841) without attention; any strides."""

    def __init__(self, dimensions: int, channels: int, widths: Sequence[int], strides: Sequence[int], out: int) -> None:
        conv, layers = _CONV[dimensions], [_CONV[dimensions](channels, widths[0], 5, padding=2)]
        for before, width, stride in zip([widths[0], *widths], widths, strides, strict=False):
            down = conv(width, width, 2 * stride + 1, stride, padding=stride) if stride > 1 else nn.Identity()
            layers += [Block(dimensions, before, width), down]
        last = [Block(dimensions, widths[-1], widths[-1]), norm(widths[-1]), nn.SiLU(), conv(widths[-1], out, 1)]
        super().__init__(*layers, *last)


class Decoder(nn.Sequential):
    """The encoder's mirror: latents are repeated, then convolved, which leaves no chequers."""

    def __init__(self, dimensions: int, latent: int, widths: Sequence[int], strides: Sequence[int], out: int) -> None:
        conv = _CONV[dimensions]
        layers = [conv(latent, widths[-1], 3, padding=1), Block(dimensions, widths[-1], widths[-1])]
        for number in reversed(range(len(widths))):
            width, stride, after = widths[number], strides[number], widths[max(0, number - 1)]
            if stride > 1:
                layers += [nn.Upsample(scale_factor=stride), conv(width, width, 2 * (stride // 2) + 1, padding="same")]
            layers.append(Block(dimensions, width, after))
        super().__init__(*layers, norm(widths[0]), nn.SiLU(), conv(widths[0], out, 5, padding=2))


class Critic(nn.Module):
    """Tells what is real from what is made, patch by patch (Isola et al., https://arxiv.org/abs/1611.07004).

    At several scales as in MelGAN (https://arxiv.org/abs/1910.06711), each half as fine as the one before. Whether it
    fits the words it is told by projection (Miyato and Koyama, https://arxiv.org/abs/1802.05637).
    """

    def __init__(
        self, shape: tuple[int, int], width: int, layers: int, scales: int, words: tuple[int, int] | None = None
    ) -> None:
        """`shape`: dimensions and channels of the input; `words`: vocabulary and width of what it is told, if it is."""
        super().__init__()
        dimensions, channels = shape
        self._pool: Any = {1: F.avg_pool1d, 2: F.avg_pool2d}[dimensions]
        conv = _CONV[dimensions]
        kernel, stride = (15, 4) if dimensions == 1 else (4, 2)
        last = width * min(2 ** (layers - 1), 8)
        self.words = Words(*words) if words else None
        self.told = nn.Linear(words[1], last, bias=False) if words else None
        self.scales = nn.ModuleList()
        for _ in range(scales):
            steps: list[nn.Module] = [
                nn.Sequential(conv(channels, width, kernel, stride, kernel // 2), nn.LeakyReLU(0.2))
            ]
            for number in range(1, layers):
                a, b = width * min(2 ** (number - 1), 8), width * min(2**number, 8)
                steps.append(nn.Sequential(conv(a, b, kernel, stride, kernel // 2), norm(b), nn.LeakyReLU(0.2)))
            # Without a bias: while all opinions are within the hinge its gradient is 0, and Adam would step by noise.
            steps.append(conv(last, 1, 3, padding=1, bias=False))
            self.scales.append(nn.ModuleList(steps))

    def forward(self, x: Tensor, *words: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(opinions by scale, high where it looks real; features by scale and layer), each (B, channels, *sizes)."""
        x = x.to(next(self.parameters()).dtype)
        told = self.told(self.words(*words)) if self.words is not None and self.told is not None else None
        opinions, features = [], []
        for number, layers in enumerate(self.scales):
            steps: Any = layers
            hidden = self._pool(x, 2**number) if number else x
            for step in steps:
                hidden = step(hidden)
                features.append(hidden)
            opinion = features.pop()
            if told is not None:
                fit = (features[-1] * told[(..., *[None] * (x.ndim - 2))]).sum(1, keepdim=True)
                opinion = opinion + fit / told.shape[1] ** 0.5  # as large as the opinion at first, whatever the width
            opinions.append(opinion)
        return opinions, features


def signal_of(values: Tensor) -> Tensor:
    """Images uint8 (B, height, width, 3) or sounds (B, F) as float32 (B, C, *S) from -1 to 1."""
    return values.movedim(-1, 1).float() / 127.5 - 1 if values.ndim == 4 else values.float()[:, None]


def mean_by_row(x: Tensor) -> Tensor:
    """(B, …) → (B,), in float32."""
    return x.float().flatten(1).mean(1)


def fit_to(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Cut at the end to `sizes`."""
    return x[(slice(None), slice(None), *(slice(size) for size in sizes))]


def pad_to_multiple(x: Tensor, of: int) -> Tensor:
    """The last pixels or frames repeated at the end, until every size is a multiple."""
    missing = [-size % of for size in x.shape[2:]]
    if not any(missing):
        return x
    return F.pad(x, [n for size in reversed(missing) for n in (0, size)], mode="replicate")


def seeded_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """N(0, 1) of float32 (B, *shape), each row drawn from its own seed, on any ranks alike."""
    rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(int(seed) >> 1)) for seed in seeds]
    return torch.stack(rows).to(device)
