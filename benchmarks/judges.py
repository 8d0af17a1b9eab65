"""Judges of what was made, trained on real samples alone: classifiers, and distances between their features.

A small convolutional classifier tells classes of pictures or of spectrograms, or the words that belong to a picture.
Two pictures' distance is LPIPS's formula (Zhang et al., https://arxiv.org/abs/1801.03924, equation 1, without its
learned weights) in the features of its stages; that of two sets is Fréchet's (Heusel et al.,
https://arxiv.org/abs/1706.08500) in the features before its last layer. B rows, C channels, N samples, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Judge(nn.Module):
    """Stages of two convolutions, each half as fine as the one before; a mean, and a linear layer."""

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for before, width in zip((channels, *widths), widths, strict=False):
            first, second = nn.Conv2d(before, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
            stage = [first, nn.GroupNorm(8, width), nn.ReLU(), second, nn.GroupNorm(8, width), nn.ReLU()]
            self.stages.append(nn.Sequential(*stage))
        self.last = nn.Linear(widths[-1], classes)

    def features(self, x: Tensor) -> list[Tensor]:
        """(B, width, *sizes) of each stage, of (B, C, height, width)."""
        found = []
        for number, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if number else x)
            found.append(x)
        return found

    def pooled(self, x: Tensor) -> Tensor:
        """(B, D): what the last layer sees."""
        return self.features(x)[-1].mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, classes)."""
        return self.last(self.pooled(x))


def train(x: Tensor, aims: Tensor, epochs: int, seed: int = 0, shift: int = 2) -> Judge:
    """A judge of inputs (N, C, height, width): `aims` are classes, int64 (N,), or words that belong to each, (N, K).

    Inputs are moved by up to `shift` places. AdamW with one cycle of the learning rate, batches of 64.
    """
    torch.manual_seed(seed)
    classes = aims.shape[1] if aims.ndim == 2 else int(aims.max()) + 1
    judge, batch = Judge(x.shape[1], classes), 64
    optimiser = torch.optim.AdamW(judge.parameters(), 1e-3, weight_decay=0.05)
    steps = epochs * -(-len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(batch):
            given = torch.roll(x[chosen], torch.randint(-shift, shift + 1, (2,)).tolist(), (2, 3))
            scores, aim = judge(given), aims[chosen]
            many = F.binary_cross_entropy_with_logits if aims.ndim == 2 else F.cross_entropy
            many(scores, aim).backward()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
    return judge.eval()


def kept(path: Path, x: Tensor, aims: Tensor, epochs: int) -> Judge:
    """As `train`; a judge that an earlier call wrote to `path` is read."""
    if not path.is_file():
        torch.save(train(x, aims, epochs), path)
    judge: Judge = torch.load(path, weights_only=False)
    return judge.eval()


@torch.inference_mode()
def by_batches(ask: Any, *inputs: Tensor, rows: int = 128) -> Tensor:
    """What `ask` answers, of all rows."""
    return torch.cat([ask(*parts) for parts in zip(*(x.split(rows) for x in inputs), strict=True)])


def accuracy(judge: Judge, x: Tensor, classes_N: Tensor) -> float:
    """Share of inputs whose class it finds."""
    return float((by_batches(judge, x).argmax(1) == classes_N).float().mean())


def perceptual(judge: Judge, a: Tensor, b: Tensor) -> Tensor:
    """Distance (N,) of pairs: squared differences of features of length 1, averaged over places, summed over stages."""

    def ask(a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(judge.features(a), judge.features(b), strict=True)
        apart = [(F.normalize(one) - F.normalize(other)).square().sum(1).mean((1, 2)) for one, other in pairs]
        return torch.stack(apart).sum(0)

    return by_batches(ask, a, b)


def frechet(a_ND: Tensor, b_ND: Tensor) -> float:
    """|mean difference|² + trace(A + B - 2 (A B)^½) of the covariances A and B."""
    a, b = (x.double().numpy() for x in (a_ND, b_ND))
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The root's trace is the sum of the roots of the eigenvalues of A B, which are real and not negative.
    roots = np.sqrt(np.clip(np.linalg.eigvals(first @ second).real, 0, None))
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first) + np.trace(second) - 2 * roots.sum())
