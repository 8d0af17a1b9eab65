"""benchmarks/judges.py and what recipes are compared with: against closed forms."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.house.typing_tree import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other as siblings

import codec_images
import judges


def test_frechet_of_normal_distributions() -> None:
    """Of N(0, diag(a²)) and N(m, diag(b²)): |m|² + Σ (a - b)²."""
    random = np.random.default_rng(0)
    a, b, moved = (np.array(x) for x in ([1.0, 2.0, 0.5], [2.0, 2.0, 1.0], [1.0, 0.0, -1.0]))
    first, second = random.standard_normal((2, 40_000, 3))
    found = judges.frechet(torch.from_numpy(first * a), torch.from_numpy(second * b + moved))
    assert found == pytest.approx(np.square(moved).sum() + np.square(a - b).sum(), rel=0.05)
    assert judges.frechet(torch.from_numpy(first), torch.from_numpy(first)) == pytest.approx(0, abs=1e-8)


def test_a_judge_learns_and_its_distance_grows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classes = torch.arange(128) % 2
    x = torch.randn(128, 3, 16, 16) * 0.1 + (2.0 * classes - 1)[:, None, None, None] * torch.linspace(-1, 1, 16)
    judge = judges.kept(tmp_path / "judge.pt", x, classes, 6)
    assert judges.accuracy(judge, x, classes) > 0.95
    again = judges.kept(tmp_path / "judge.pt", x, classes, 0)
    assert torch.equal(again.pooled(x), judge.pooled(x))
    near, far = (judges.perceptual(judge, x, x + s * torch.randn_like(x)) for s in (0.05, 0.5))
    assert judges.perceptual(judge, x, x).abs().max() == 0 and (near < far).all()


@pytest.mark.parametrize("kind", ["WEBP", "JPEG"])
def test_same_size_keeps_to_the_bytes_and_uses_them(kind: str) -> None:
    random = np.random.default_rng(0)
    steep = np.linspace(0, 255, 32)[None, :, None] * random.random((3, 1, 1, 3))
    images = np.broadcast_to(steep, (3, 32, 32, 3)).astype(np.uint8)
    few, small = codec_images.same_size(images, kind, 40)
    more, large = codec_images.same_size(images, kind, 400)
    assert small <= 40 and large <= 400 and few.shape == images.shape
    errors = [np.abs(made.astype(float) - images).mean() for made in (few, more)]
    assert errors[1] < errors[0]
