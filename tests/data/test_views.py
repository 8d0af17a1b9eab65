"""Views of images and sounds: what is made, from which seed, the same on any ranks and workers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from millrace.core.errors import UserError
from millrace.data.batch import SampleBatch
from millrace.data.config import DataConfig
from millrace.data.loader import Loader, build_loader, heldout_batches
from millrace.data.modalities.audio import AudioView, resample
from millrace.data.modalities.image import ImageView
from millrace.data.prepare import PrepareConfig, prepare

COUNT = 24
WEAK: dict[str, Any] = {"role": "image", "size": 12, "scale": [0.5, 1.0], "flip": True}


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.floats(0.05, 1.0), st.integers(0, 2**32))
@settings(max_examples=60)
def test_any_image_becomes_a_square(width: int, height: int, size: int, least: float, seed: int) -> None:
    value = random(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    view = ImageView(size=size, scale=[least, 1.0], flip=True, shift=0.2, strength=1.0)
    made = [view.make(value, b"", random(seed)) for _ in range(2)]
    assert made[0].shape == (size, size, 3) and made[0].dtype == np.uint8
    assert np.array_equal(*made), "the same from the same seed"


def test_the_middle_without_any_change() -> None:
    value = random().integers(0, 256, (8, 14, 3)).astype(np.uint8)
    assert np.array_equal(ImageView(size=8).make(value, b"", random()), value[:, 3:11])
    square = value[:, :8].copy()
    assert np.array_equal(ImageView(size=8).make(square, b"", random()), square), "nothing is resampled"


def test_flipped_in_half_of_them_and_moved_by_so_much() -> None:
    value = random().integers(0, 256, (8, 8, 3)).astype(np.uint8)
    flipped = [
        np.array_equal(ImageView(size=8, flip=True).make(value, b"", random(n)), value[:, ::-1]) for n in range(400)
    ]
    assert 160 < sum(flipped) < 240
    dot = np.zeros((9, 9, 3), np.uint8)
    dot[4, 4] = 255
    places = {
        tuple(np.argwhere(ImageView(size=9, shift=2 / 9).make(dot, b"", random(n))[..., 0])[0]) for n in range(400)
    }
    assert places == {(row, column) for row in range(2, 7) for column in range(2, 7)}


@pytest.mark.parametrize(("rate", "wanted"), [(8000, 16000), (16000, 8000), (22050, 16000), (44100, 8000)])
def test_a_tone_keeps_its_pitch_and_loudness(rate: int, wanted: int) -> None:
    """Against the closed form: a windowed sine below both Nyquist frequencies, sampled at the other rate."""

    def tone(at: np.ndarray) -> np.ndarray:
        return np.sin(2 * np.pi * 440 * at) * np.exp(-(((at - 0.5) / 0.1) ** 2))

    made = resample(tone(np.arange(rate) / rate).astype(np.float32), rate, wanted)
    assert len(made) == wanted and made.dtype == np.float32
    np.testing.assert_allclose(made, tone(np.arange(wanted) / wanted), atol=1e-5)


def test_what_the_other_rate_cannot_hold_is_left_out() -> None:
    at = np.arange(16000) / 16000
    high = np.sin(2 * np.pi * 6000 * at) * np.exp(-(((at - 0.5) / 0.1) ** 2))
    assert np.abs(resample(high.astype(np.float32), 16000, 8000)).max() < 1e-3


def test_sounds_of_one_length(corpora: Any) -> None:
    raw = corpora.make_wav(1000, 8000)
    value = random().standard_normal(1000).astype(np.float32)
    view = AudioView(rate=8000, seconds=0.2)
    assert np.array_equal(view.make(value, raw, random()), np.pad(value, (0, 600)))
    assert np.array_equal(AudioView(rate=8000, seconds=0.05).make(value, raw, random()), value[:400])
    starts = {
        int(np.flatnonzero(AudioView(rate=8000, seconds=0.126, anywhere=True).make(value, raw, random(n)))[0])
        for n in range(100)
    }
    assert min(starts) == 0 and max(starts) == 8
    louder = AudioView(rate=8000, gain=6.0, noise=20.0).make(value, raw, random())
    assert louder.shape == value.shape and louder.dtype == np.float32 and not np.array_equal(louder, value)


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(random(number).integers(0, 256, (20, 10 + number, 3)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def corpus(corpora: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    columns = {
        "png": [png(n) for n in range(COUNT)],
        "wav": [corpora.make_wav(500 + 10 * n, 8000) for n in range(COUNT)],
    }
    pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=5)
    prepare(PrepareConfig(inputs=[str(folder / "a.parquet")], out=str(folder / "out"), image="png", audio="wav"))
    return folder / "out"


def load(corpus: Path, views: list[dict[str, Any]], rank: int = 0, world: int = 1, **more: Any) -> Loader:
    config = DataConfig(manifest=str(corpus), rows="samples", window=8, views=views, **more)
    return build_loader(config, seed=3, batch_rows=8, micro_batch=2, rank=rank, world=world)


def by_sample(loaders: list[Loader], steps: int) -> list[dict[tuple[int, str], torch.Tensor]]:
    """For each step: the view of each sample by name."""
    found = []
    for _ in range(steps):
        step: dict[tuple[int, str], torch.Tensor] = {}
        for loader in loaders:
            for micro in next(loader).micro_batches:
                for name, values in micro.values.items():
                    step |= {(sample, name): values[row] for row, sample in enumerate(micro.samples)}
        found.append(step)
    return found


def test_the_same_on_any_ranks_and_workers_and_others_when_a_sample_comes_again(corpus: Path) -> None:
    views = [WEAK | {"name": "weak", "count": 2}, WEAK | {"name": "strong", "strength": 1.0}]
    views += [{"role": "audio", "rate": 4000, "seconds": 0.1, "anywhere": True}]
    with load(corpus, views) as alone:
        expected = by_sample([alone], 6)
    assert {name for _, name in expected[0]} == {"weak0", "weak1", "strong", "audio"}
    assert expected[0][next(k for k in expected[0] if k[1] == "audio")].shape == (400,)
    for world, workers, threads in ((2, 0, 4), (4, 0, 1), (1, 2, 2)):
        loaders = [load(corpus, views, rank, world, workers=workers, threads=threads) for rank in range(world)]
        for step, other in zip(expected, by_sample(loaders, 6), strict=True):
            assert step.keys() == other.keys()
            assert all(torch.equal(step[key], other[key]) for key in step)
        for loader in loaders:
            loader.close()
    first = {key: value for step in expected[:3] for key, value in step.items()}
    second = {key: value for step in expected[3:] for key, value in step.items()}
    again = [torch.equal(first[key], second[key]) for key in first if key[1] == "weak0"]
    assert len(again) == COUNT and sum(again) < COUNT / 4
    assert not all(torch.equal(first[s, "weak0"], first[s, "weak1"]) for s, _ in first)


def test_samples_without_text_need_no_tokenizer(corpus: Path) -> None:
    with load(corpus, []) as loader:
        values = next(loader).micro_batches[0].values
    assert set(values) == {"image", "audio"}


def test_an_image_that_cannot_be_looked_at_is_quarantined(tmp_path: Path) -> None:
    images = [png(n)[: 300 if n == 3 else None] for n in range(8)]  # one is cut short
    pq.write_table(pa.table({"png": images}), tmp_path / "a.parquet")
    prepare(PrepareConfig(inputs=[str(tmp_path / "a.parquet")], out=str(tmp_path / "out"), image="png"))
    with load(tmp_path / "out", [WEAK]) as loader:
        batch = next(loader)
    (entry,) = batch.quarantined
    assert entry["sample"] == 3 and "image cannot be decoded" in entry["why"]
    assert batch.local_tokens == 7
    ((micro, row),) = [(m, row) for m in batch.micro_batches for row, good in enumerate(m.good) if not good]
    assert micro.values["image"].shape == (2, 12, 12, 3) and not micro.values["image"][row].any()


@pytest.mark.parametrize(
    ("views", "why"),
    [
        ([{"size": 8}], "has no role"),
        ([{"role": "imgae", "size": 8}], "imgae.*did you mean 'image'"),
        ([{"role": "image", "sise": 8}], "sise.*did you mean 'size'"),
        ([WEAK, WEAK], "image is the name of several"),
        ([WEAK | {"scale": [0.5]}], "give two shares"),
        ([{"role": "audio", "rate": 0}], "must be at least 1"),
    ],
)
def test_mistakes(views: list[dict[str, Any]], why: str) -> None:
    with pytest.raises((UserError, ValueError), match=why):
        DataConfig(manifest="x", rows="samples", views=views)


def test_views_are_of_samples(corpus: Path) -> None:
    with pytest.raises(ValueError, match="views are for rows = 'samples', not 'packed'"):
        DataConfig(manifest="x", views=[WEAK])


def test_heldout_samples_once_each_and_the_same_number_on_every_rank(corpus: Path) -> None:
    config = DataConfig(manifest=str(corpus), heldout=str(corpus), rows="samples", views=[WEAK])
    seen: list[int] = []
    ranks = [list(heldout_batches(config, 5, rank, 2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 3, "24 samples in micro-batches of 5 on two ranks"
    for micro, size in ranks[0] + ranks[1]:
        assert isinstance(micro, SampleBatch) and size == 0
        assert micro.values["image"].shape == (5, 12, 12, 3)
        seen += [sample for sample, good in zip(micro.samples, micro.good, strict=True) if good]
    assert sorted(seen) == list(range(COUNT))
