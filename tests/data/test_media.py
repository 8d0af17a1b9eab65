"""Samples with images and sounds: packed by their cost, or one whole sample in a row."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image

from millrace.core.errors import UserError
from millrace.data.batch import IGNORED, MicroBatch, SampleBatch
from millrace.data.config import DataConfig
from millrace.data.corpus import Corpus
from millrace.data.loader import Loader, build_loader
from millrace.data.prepare import PrepareConfig, prepare
from millrace.data.tokenizer import load_tokenizer

COUNT = 24


def png(number: int) -> tuple[bytes, np.ndarray]:
    pixels = np.random.default_rng(number).integers(0, 255, (16 + 8 * (number % 4), 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue(), pixels


def wav(number: int) -> tuple[bytes, np.ndarray]:
    sound = np.random.default_rng(number).uniform(-0.5, 0.5, 1600 + 160 * number).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, sound, 16000, format="WAV", subtype="FLOAT")
    return file.getvalue(), sound


def text(number: int) -> str:
    return " ".join(["picture", "of", "noise"] * (1 + number % 3)) + f" {number}"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet of images with captions, 8-pixel patches."""
    folder = tmp_path_factory.mktemp("pictures")
    columns = {"png": [png(n)[0] for n in range(COUNT)], "caption": [text(n) for n in range(COUNT)]}
    pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=5)
    options: dict[str, Any] = {"text": "caption", "image": "png", "costs": costs(8)}
    prepare(PrepareConfig(inputs=[str(folder / "a.parquet")], out=str(folder / "out"), vocab_size=280, **options))
    return folder / "out"


def costs(patch: int) -> Any:
    return {"image": {"patch": patch}}


def load(corpus: Path, **more: Any) -> Loader:
    rank, world, micro = (more.pop(k, d) for k, d in (("rank", 0), ("world", 1), ("micro", 6)))
    config = DataConfig(manifest=str(corpus), **{"sequence_length": 64, "prefetch": 0, "threads": 2} | more)
    return build_loader(config, seed=2, batch_rows=6, micro_batch=micro, rank=rank, world=world)


def test_media_stand_in_their_rows_and_are_no_targets(pictures: Path) -> None:
    tokenizer = load_tokenizer(pictures / "tokenizer")
    seen = set()
    with load(pictures) as loader:
        for _ in range(6):
            (micro,) = next(loader).micro_batches
            assert isinstance(micro, MicroBatch)
            media = iter(micro.media)
            for row, (spans, counts) in enumerate(zip(micro.spans, micro.seq_lens, strict=True)):
                at = 0
                for (sample, start, end), count in zip(spans, counts, strict=True):
                    medium, pixels = next(media), png(sample)[1]
                    grid = -(-pixels.shape[0] // 8) * 3
                    ids = tokenizer.encode([text(sample)])[0].tolist()
                    assert (start, end) == (0, grid + len(ids) + 1) and count == end
                    assert (medium.role, medium.row, medium.start, medium.positions) == ("image", row, at + 1, grid)
                    assert torch.equal(medium.value, torch.from_numpy(pixels))
                    labels = micro.labels_BT[row, at : at + count].tolist()
                    assert labels == [IGNORED] * grid + [*ids, tokenizer.eos_id]
                    inputs = micro.input_ids_BT[row, at : at + count].tolist()
                    assert inputs == [tokenizer.bos_id] + [tokenizer.eos_id] * grid + ids
                    seen.add(sample)
                    at += count
            assert next(media, None) is None
    assert len(seen) > COUNT / 2


def test_bytes_are_those_of_the_captions(pictures: Path) -> None:
    with load(pictures) as loader:
        for _ in range(6):
            batch = next(loader)
            assert batch.local_bytes == sum(len(text(sample)) for sample, _, _ in batch.spans)


def test_more_samples_that_no_row_can_hold_than_may_be_bad_are_refused_at_the_start(pictures: Path) -> None:
    longer = Corpus.load(str(pictures)).count_longer(20)
    assert longer == sum(cost > 20 for cost in Corpus.load(str(pictures)).entries(np.arange(COUNT)).tokens) > 3
    with load(pictures, sequence_length=20, max_bad_samples=longer):
        pass
    with pytest.raises(UserError, match=rf"{longer} of 24 samples of .* cost more positions than a row has \(20\)"):
        load(pictures, sequence_length=20, max_bad_samples=longer - 1)


def test_a_sample_that_needs_more_than_a_row_is_left_out(pictures: Path) -> None:
    with load(pictures, sequence_length=20, max_bad_samples=100) as loader:
        batches = [next(loader) for _ in range(12)]
    bad = {e["sample"]: e["why"] for batch in batches for e in batch.quarantined}
    assert bad and set(bad.values()) == {"costs more positions than a row has (20)"}
    for batch in batches:
        for micro in batch.micro_batches:
            for row, spans in enumerate(micro.spans):
                refused = [s for s, _, _ in spans if s in bad]
                assert not refused or (micro.labels_BT[row] == IGNORED).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_whole_samples_come_in_every_epoch_once(pictures: Path, workers: int) -> None:
    seen: list[int] = []
    with load(pictures, rows="samples", window=COUNT, workers=workers, world=2, rank=1, micro=1) as loader:
        for _ in range(COUNT // 6):
            batch = next(loader)
            assert batch.local_tokens == 3 and len(batch.spans) == 6
            seen += [sample for sample, _, _ in batch.spans]
            for micro in batch.micro_batches:
                assert isinstance(micro, SampleBatch) and micro.good == [True]
                assert torch.equal(micro.values["image"][0], torch.from_numpy(png(micro.samples[0])[1]))
    assert sorted(seen) == list(range(COUNT))


def test_images_of_one_size_are_stacked_and_others_listed(pictures: Path) -> None:
    tokenizer = load_tokenizer(pictures / "tokenizer")
    with load(pictures, rows="samples") as loader:
        (micro,) = next(loader).micro_batches
    shapes = {png(sample)[1].shape for sample in micro.samples}
    assert isinstance(micro.values["image"], torch.Tensor if len(shapes) == 1 else list)
    for row, sample in enumerate(micro.samples):
        length = int(micro.lengths["tokens"][row])
        expected = [*tokenizer.encode([text(sample)])[0].tolist(), tokenizer.eos_id]
        assert micro.values["tokens"][row, :length].tolist() == expected
        assert (micro.values["tokens"][row, length:] == tokenizer.eos_id).all()


def test_sounds_are_padded_and_bad_ones_are_silent(corpora: Any, tmp_path: Path) -> None:
    sounds = [wav(n) for n in range(12)]
    table = pa.table({"wav": [raw for raw, _ in sounds], "caption": [text(n) for n in range(12)]})
    pq.write_table(table, tmp_path / "a.parquet")
    out = tmp_path / "out"
    prepare(
        PrepareConfig(inputs=[str(tmp_path / "a.parquet")], out=str(out), vocab_size=280, text="caption", audio="wav")
    )
    with load(out, rows="samples") as loader:
        loader.exclude({4: "known to be bad"})
        batches = [next(loader) for _ in range(2)]
    seen = []
    for batch in batches:
        (micro,) = batch.micro_batches
        for row, sample in enumerate(micro.samples):
            seen.append(sample)
            length = int(micro.lengths["audio"][row])
            assert micro.good[row] == (sample != 4) and length == (len(sounds[sample][1]) if sample != 4 else 0)
            assert torch.equal(micro.values["audio"][row, :length], torch.from_numpy(sounds[sample][1][:length]))
            assert not micro.values["audio"][row, length:].any()
        assert batch.local_tokens == 6 - (4 in micro.samples)
    assert sorted(seen) == list(range(12))
