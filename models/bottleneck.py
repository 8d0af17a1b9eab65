"""What a codec's latents pass through: a codebook, a grid, a normal distribution, or nothing.

B rows, L latents of a row, D width of a latent, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ONE = float(2**32)  # sums of unit vectors are counted in whole parts of it: their order then changes no bit


class Latent(NamedTuple):
    """Latents after the bottleneck."""

    values_BLD: Tensor
    cost_B: Tensor  # what the bottleneck adds to a row's loss, before its weight
    index_BL: Tensor | None = None  # codes, int64, where there are any


class Nothing(nn.Module):
    """A plain autoencoder."""

    codes = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs = self.width = width

    def forward(self, latent_BLD: Tensor, noise_BLD: Tensor | None = None) -> Latent:
        """The latents as they are."""
        return Latent(latent_BLD, latent_BLD.new_zeros(len(latent_BLD)))


class Normal(Nothing):
    """A variational autoencoder (Kingma and Welling, https://arxiv.org/abs/1312.6114): a mean and a variance each."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.inputs = 2 * width

    def forward(self, latent_BLD: Tensor, noise_BLD: Tensor | None = None) -> Latent:
        """Latents drawn with `noise` from N(0, 1), or their mean; the cost is the divergence in nats for each."""
        mean, log_variance = latent_BLD.float().chunk(2, -1)
        log_variance = log_variance.clamp(-30, 20)
        values = mean if noise_BLD is None else mean + (log_variance / 2).exp() * noise_BLD
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1) / 2
        return Latent(values.to(latent_BLD.dtype), divergence.mean(1))


class Grid(nn.Module):
    """Finite scalar quantisation (Mentzer et al., https://arxiv.org/abs/2309.15505): each dimension is rounded."""

    place: Tensor
    count: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels, self.inputs, self.width = list(levels), len(levels), len(levels)
        self.codes = math.prod(levels)
        for name, value in self.constants().items():
            self.register_buffer(name, value, persistent=False)

    def constants(self) -> dict[str, Tensor]:
        """The buffers: levels of each dimension, and by what its level is multiplied in a code."""
        places = [math.prod(self.levels[:number]) for number in range(len(self.levels))]
        return {"place": torch.tensor(places), "count": torch.tensor(self.levels)}

    def forward(self, latent_BLD: Tensor, noise_BLD: Tensor | None = None) -> Latent:
        """Levels as values in [-1, 1]; their gradient is that of the bounded latents."""
        count = self.count.float()
        half = (count - 1) * 1.001 / 2  # so that the outermost levels are reached
        offset = (self.count % 2 == 0).float() / 2
        bounded = (latent_BLD.float() + (offset / half).atanh()).tanh() * half - offset
        level = bounded + (bounded.round() - bounded).detach()
        values, middle = level / (self.count // 2), self.count // 2
        index = ((bounded.detach().round().long() + middle) * self.place).sum(-1)
        return Latent(values.to(latent_BLD.dtype), latent_BLD.new_zeros(len(latent_BLD)), index)

    def look_up(self, index_BL: Tensor) -> Tensor:
        """The values (B, L, D) of codes."""
        level = index_BL[..., None] // self.place % self.count
        return (level - self.count // 2).float() / (self.count // 2)


class Codebook(nn.Module):
    """Vector quantisation (van den Oord et al., https://arxiv.org/abs/1711.00937) on the unit sphere.

    Codes are the directions of running means of what chose them (the paper's appendix A.1), so they have no gradient;
    on the sphere as in ViT-VQGAN (https://arxiv.org/abs/2110.04627, section 3.2). They are buffers: as frozen
    parameters, ZeRO 3 would lose what is written into them.
    """

    directions: Tensor
    sums: Tensor
    uses: Tensor

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.codes, self.inputs, self.width = codes, width, width
        self.register_buffer("directions", F.normalize(torch.randn(codes, width), dim=1))
        self.register_buffer("sums", torch.zeros(codes, width))
        self.register_buffer("uses", torch.zeros(codes))  # in a step, a running mean

    def forward(self, latent_BLD: Tensor, noise_BLD: Tensor | None = None) -> Latent:
        """The nearest code's direction, with the gradient of the latents'; the cost is the squared distance to it."""
        given = F.normalize(latent_BLD.float(), dim=-1)
        index = (given.detach() @ self.directions.float().T).argmax(-1)
        nearest = self.look_up(index)
        cost = (given - nearest).square().sum(-1).mean(1)
        return Latent((given + (nearest - given).detach()).to(latent_BLD.dtype), cost, index)

    def look_up(self, index_BL: Tensor) -> Tensor:
        """The values (B, L, D) of codes."""
        return self.directions.float()[index_BL]

    @torch.no_grad()
    def count(self, latent_NLD: Tensor, index_NL: Tensor) -> Tensor:
        """What chose each code, int64 (K, D + 1): how many, and the sum of their directions in parts of 2^-32."""
        given = (F.normalize(latent_NLD.double(), dim=-1) * _ONE).round().long().flatten(0, 1)
        rows = torch.cat([torch.ones_like(given[:, :1]), given], 1)
        return torch.zeros(self.codes, 1 + self.width, dtype=torch.long, device=rows.device).index_add_(
            0, index_NL.flatten(), rows
        )

    @torch.no_grad()
    def follow(self, counted: Tensor, candidates_ND: Tensor, valid: Tensor, decay: float) -> None:
        """Move towards what chose each code in a step, by `count` of all ranks; equal on all ranks.

        A code used less than a tenth as often as the mean is replaced by one of the first `valid` candidates, latents
        of this step, as in Jukebox (https://arxiv.org/abs/2005.00341, appendix B.1), as long as there are any.
        """
        counts, sums = counted[:, 0].float(), (counted[:, 1:].double() / _ONE).float()
        self.uses.lerp_(counts, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        typical = counts.sum() / self.codes
        dead = self.uses < typical / 10
        number = dead.cumsum(0) - 1
        dead &= number < valid
        fresh = F.normalize(candidates_ND.float(), dim=1)[number.clamp(0, len(candidates_ND) - 1)]
        self.uses.copy_(torch.where(dead, typical, self.uses))
        self.sums.copy_(torch.where(dead[:, None], fresh * typical, self.sums))
        known = self.sums.square().sum(1, keepdim=True) > 0  # what nothing ever chose stays where it is
        self.directions.copy_(torch.where(known, F.normalize(self.sums, dim=1), self.directions))


def build_bottleneck(kind: str, codes: int, width: int, levels: Sequence[int]) -> nn.Module:
    """The bottleneck of a codec's configuration."""
    made = {"vq": lambda: Codebook(codes, width), "fsq": lambda: Grid(levels), "kl": lambda: Normal(width)}
    return made.get(kind, lambda: Nothing(width))()
