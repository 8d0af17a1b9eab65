"""Bottlenecks, spectra and codecs as models of transformers."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal as Gaussian
from torch.distributions import kl_divergence
from torch.nn import functional as F
from transformers import AutoModel

from millrace.core.errors import UserError
from millrace.models.bottleneck import Codebook, Grid, Normal
from millrace.models.bridge import build_sized
from millrace.models.codec import Codec, CodecConfig
from millrace.models.config import ModelConfig
from millrace.models.convolutions import norm, pad_to_multiple
from millrace.models.sound import spectral_distance

SMALL: dict[str, Any] = {"widths": [8, 16], "strides": [2, 2], "latent": 4, "codes": 16}
KINDS: dict[str, dict[str, Any]] = {
    "vq": {},
    "fsq": {"bottleneck": "fsq", "levels": [5, 4, 3]},
    "kl": {"bottleneck": "kl"},
    "none": {"bottleneck": "none"},
    "waveform": {"modality": "audio", "strides": [2, 5]},
    "mel": {"modality": "audio", "mel": {"rate": 8000, "window": 64, "hop": 16, "bands": 16}},
}


def build(kind: str) -> Codec:
    made: Codec = build_sized(ModelConfig(kind="codec", config=SMALL | KINDS[kind]), CodecConfig, 0)
    return made.eval()


def values(codec: Codec) -> torch.Tensor:
    """Sizes that are no multiple of the stride."""
    torch.manual_seed(1)
    if codec.config.modality == "image":
        return torch.randint(0, 256, (2, 19, 14, 3), dtype=torch.uint8)
    return torch.rand(2, 403) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_is_the_same_model(tmp_path: Path, kind: str) -> None:
    codec = build(kind)
    before = codec(values(codec))
    assert before.made.shape == before.given.shape and before.made.isfinite().all()
    codec.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)(values(codec))
    assert torch.equal(again.made, before.made)


@pytest.mark.parametrize("kind", ["vq", "fsq", "waveform", "mel"])
def test_codes_restore_what_training_saw(kind: str) -> None:
    codec = build(kind)
    given = values(codec)
    codes, whole = codec.encode(given), codec(given)
    restored = codec.decode(codes)
    height = -(-whole.given.shape[-1] // codec.config.stride)
    assert codes.shape[-1] == height and codes.max() < codec.codes
    if kind in ("vq", "fsq"):
        made = ((whole.made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)
        difference = (restored[:, :19, :14].int() - made.int()).abs()
        assert difference.max() <= 1  # rounding
    else:
        signal = restored / 2 + 1 if kind == "mel" else restored[:, None]
        torch.testing.assert_close(signal[..., : whole.made.shape[-1]], whole.made, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["kl", "none"])
def test_continuous_latents_have_no_codes(kind: str) -> None:
    codec = build(kind)
    with pytest.raises(ValueError, match="has no codes; train vq or fsq"):
        codec.encode(values(codec))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"bottleneck": "rvq"}, "one of vq, fsq, kl, none"),
        ({"modality": "video"}, "give image or audio"),
        ({"strides": [2]}, "one of each for every stage"),
        ({"mel": {}}, "mel is for sounds"),
        ({"codes": 0}, "at least 1"),
        ({"width": 3}, "unknown key 'model.config.width'.*did you mean"),
    ],
)
def test_bad_sizes(config: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        build_sized(ModelConfig(kind="codec", config=SMALL | config), CodecConfig, 0)


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [2, 3], [7], [4, 4, 4]])
def test_every_level_of_a_grid_is_a_code(levels: list[int]) -> None:
    grid = Grid(levels)
    index = torch.arange(grid.codes)[None]
    centres = grid.look_up(index)
    assert len({tuple(row) for row in centres[0].tolist()}) == grid.codes
    steps = [(np.arange(n) - n // 2) / (n // 2) for n in levels]
    assert {tuple(row) for row in centres[0].tolist()} == {tuple(np.float32(row).tolist()) for row in product(*steps)}
    torch.manual_seed(0)
    found = grid((torch.rand(4, 20_000, len(levels)) * 2 - 1).atanh())
    assert len(found.index_BL.unique()) == grid.codes
    assert torch.equal(grid.look_up(found.index_BL), found.values_BLD)


def test_a_grid_rounds_to_the_nearest_level_and_keeps_the_gradient() -> None:
    grid, latent = Grid([5]), torch.linspace(-3, 3, 101).reshape(1, -1, 1).requires_grad_()
    found = grid(latent).values_BLD
    bounded = torch.tanh(latent) * 2.002
    torch.testing.assert_close(found, bounded.round() / 2)
    (gradient,) = torch.autograd.grad(found.sum(), latent)
    (expected,) = torch.autograd.grad((bounded / 2).sum(), latent)
    torch.testing.assert_close(gradient, expected)


def test_a_normal_costs_its_divergence() -> None:
    torch.manual_seed(0)
    latent, noise = torch.randn(3, 7, 8), torch.randn(3, 7, 4)
    mean, log_variance = latent.chunk(2, -1)
    found = Normal(4)(latent, noise)
    expected = kl_divergence(Gaussian(mean, (log_variance / 2).exp()), Gaussian(0.0, 1.0)).sum(-1).mean(1)
    torch.testing.assert_close(found.cost_B, expected)
    torch.testing.assert_close(found.values_BLD, mean + (log_variance / 2).exp() * noise)
    assert torch.equal(Normal(4)(latent).values_BLD, mean)


def test_a_codebook_follows_its_latents() -> None:
    """Nearest by angle; whole sums whatever the order; dead codes take what candidates there are."""
    torch.manual_seed(0)
    book, latent = Codebook(8, 3), torch.randn(2, 50, 3)
    found = book(latent)
    given = F.normalize(latent, dim=-1)
    assert torch.equal(found.index_BL, torch.cdist(given, book.directions.expand(2, -1, -1)).argmin(-1))
    torch.testing.assert_close(found.cost_B, (given - book.directions[found.index_BL]).square().sum(-1).mean(1))
    whole = book.count(latent, found.index_BL)
    order = torch.randperm(50)
    parts = [book.count(latent[:, part], found.index_BL[:, part]) for part in (order[:20], order[20:])]
    assert torch.equal(sum(parts[1:], parts[0]), whole) and whole[:, 0].sum() == 100
    book.directions[5] = torch.tensor([0.0, 0.0, 1.0])
    nobody = torch.zeros(8, 4, dtype=torch.long)
    nobody[:2] = book.count(latent, torch.zeros(2, 50, dtype=torch.long))[:1]  # six codes have nothing
    candidates = torch.randn(5, 3)
    book.follow(nobody, candidates, torch.tensor(4), 0.0)
    torch.testing.assert_close(book.directions[0], F.normalize(given.sum((0, 1)), dim=0))
    torch.testing.assert_close(book.directions[2:6], F.normalize(candidates[:4], dim=1))
    assert book.uses[2:6].eq(25).all() and book.uses[6:].eq(0).all()


def test_a_dead_code_without_a_candidate_is_left() -> None:
    torch.manual_seed(0)
    book = Codebook(4, 3)
    before = book.directions.clone()
    counted = book.count(torch.randn(1, 9, 3), torch.zeros(1, 9, dtype=torch.long))
    book.follow(counted, torch.randn(4, 3), torch.tensor(0), 0.5)
    assert torch.equal(book.directions[1:], before[1:]) and not torch.equal(book.directions[0], before[0])


def test_spectral_distance() -> None:
    """Against numpy's transform, for a sound that only the two shortest windows fit into."""
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 200)), random.standard_normal((2, 200))
    expected = np.zeros(2)
    for size in (64, 128):
        window = np.sin(np.pi * np.arange(size) / size) ** 2
        starts = range(0, 200 - size + 1, size // 4)
        spectra = [
            np.stack([np.abs(np.fft.rfft(x[:, s : s + size] * window)) / window.sum() for s in starts], -1)
            for x in (a, b)
        ]
        near = np.abs(spectra[0] - spectra[1]) + np.abs(np.log10(spectra[0] + 1e-4) - np.log10(spectra[1] + 1e-4))
        expected += near.reshape(2, -1).mean(1) / 2
    found = spectral_distance(torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    assert spectral_distance(torch.zeros(1, 30), torch.ones(1, 30)).item() == 0  # shorter than every window


def test_groups_have_four_channels_or_more() -> None:
    assert [norm(n).num_groups for n in (3, 8, 16, 64, 128, 256, 48)] == [1, 2, 4, 16, 32, 32, 8]


def test_padding_repeats_the_end() -> None:
    x = torch.arange(10.0).reshape(1, 1, 2, 5)
    padded = pad_to_multiple(x, 4)[0, 0]
    assert padded.shape == (4, 8) and torch.equal(padded[:2, :5], x[0, 0])
    assert padded[2:].eq(padded[1]).all() and padded[0, 5:].eq(4).all() and padded[1, 5:].eq(9).all()
