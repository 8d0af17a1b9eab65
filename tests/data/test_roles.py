"""Manifests of different roles, read as one corpus: every micro-batch looks alike and says which sample has what."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from millrace.core.errors import UserError
from millrace.data.batch import SampleBatch
from millrace.data.config import DataConfig, MixtureConfig
from millrace.data.corpus import Corpus
from millrace.data.loader import Loader, build_loader, heldout_batches
from millrace.data.modalities.codes import pack
from millrace.data.prepare import PrepareConfig, prepare

COUNT = 10
VIEWS: list[dict[str, Any]] = [
    {"role": "image", "size": 8, "flip": True},
    {"role": "audio", "rate": 8000, "seconds": 0.05},
    {"role": "audio_codes"},
]
KINDS = ("text", "pictures", "sounds", "spoken", "silent")


@pytest.fixture(scope="module")
def folder(corpora: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests of text, images with text, sounds with text, codes of sounds with text, and images alone."""
    folder = tmp_path_factory.mktemp("roles")
    columns: dict[str, dict[str, Any]] = {
        "text": {"text": [f"words alone {'and more ' * 20}{n}" for n in range(COUNT)]},
        "pictures": {"text": [f"seen {n}" for n in range(COUNT)],
                     "image": [corpora.make_png(9 + n, 12) for n in range(COUNT)]},
        "sounds": {"text": [f"heard {n}" for n in range(COUNT)],
                   "audio": [corpora.make_wav(300 + n, 8000) for n in range(COUNT)]},
        "spoken": {"text": [f"said {n}" for n in range(COUNT)],
                   "audio_codes": [pack(np.full(2 + n, n)) for n in range(COUNT)]},
        "silent": {"image": [corpora.make_png(9 + n, 14) for n in range(COUNT)]},
    }  # fmt: skip
    columns["pictures"]["image"][3] = columns["pictures"]["image"][3][:44]  # its header is there, no more
    for kind in KINDS:
        pq.write_table(pa.table(columns[kind]), folder / f"{kind}.parquet", row_group_size=4)
        named = {role: role for role in columns[kind] if role != "audio_codes"}
        media = {"audio_codes": "audio_codes"} if kind == "spoken" else {}
        words = {} if kind == "silent" else {"vocab_size": 280} if kind == "text" else tokenizer(folder)
        options: dict[str, Any] = {**named, "media": media, "heldout": 0.3, "heldout_by": "nth", **words}
        prepare(PrepareConfig(inputs=[str(folder / f"{kind}.parquet")], out=str(folder / kind), **options))
    return folder


def tokenizer(folder: Path) -> dict[str, str]:
    return {"tokenizer": str(folder / "text" / "tokenizer")}


def load(folder: Path, kinds: tuple[str, ...] = KINDS, rank: int = 0, world: int = 1, **more: Any) -> Loader:
    options: dict[str, Any] = {"rows": "samples", "views": VIEWS, "window": 5 * (COUNT - COUNT // 3)} | more
    config = DataConfig(manifest=[str(folder / kind) for kind in kinds], **options)
    return build_loader(config, seed=1, batch_rows=8, micro_batch=2, rank=rank, world=world)


def kind_of(sample: int) -> str:
    return KINDS[sample >> 40]


HAS = {"image": {"pictures", "silent"}, "audio": {"sounds"}, "audio_codes": {"spoken"},
       "tokens": {"text", "pictures", "sounds", "spoken"}}  # fmt: skip


def rows_of(micros: list[SampleBatch]) -> dict[int, dict[str, Any]]:
    """What each sample has, by name; that it has nothing else is checked."""
    found: dict[int, dict[str, Any]] = {}
    for micro in micros:
        assert list(micro.values) == list(micro.present) == ["image", "audio", "audio_codes", "tokens"]
        assert micro.values["image"].shape == (2, 8, 8, 3) and micro.values["audio"].shape == (2, 400)
        assert micro.values["audio_codes"].dtype == torch.int32 and micro.values["audio_codes"].ndim == 2
        for row, (sample, good) in enumerate(zip(micro.samples, micro.good, strict=True)):
            for name, values in micro.values.items():
                there = micro.has(name)[row]
                assert there == (good and kind_of(sample) in HAS[name])
                length = int(micro.lengths[name][row]) if name in micro.lengths else None
                assert there or not length
                if name != "tokens":
                    assert there or not values[row].any()
                if there:
                    found.setdefault(sample, {})[name] = values[row][:length]
    return found


def test_each_sample_has_what_it_has_alone(folder: Path) -> None:
    """On any ranks and workers, in every micro-batch alike; each once, though one is bad."""
    with load(folder) as loader:
        batches = [next(loader) for _ in range(5)]
    found = rows_of([micro for batch in batches for micro in batch.micro_batches])
    (bad,) = [entry for batch in batches for entry in batch.quarantined]
    assert kind_of(bad["sample"]) == "pictures" and "image cannot be decoded" in bad["why"]
    train = COUNT - COUNT // 3
    every = [sample for batch in batches for sample, _, _ in batch.spans][: train * len(KINDS)]
    assert len(set(every)) == train * len(KINDS) and set(every) - found.keys() == {bad["sample"]}
    for world, workers in ((2, 0), (4, 1)):
        loaders = [load(folder, rank=rank, world=world, workers=workers) for rank in range(world)]
        for batch in batches:
            parts = [next(loader).micro_batches for loader in loaders]
            assert len({len(part) for part in parts}) == 1
            other, expected = rows_of([micro for part in parts for micro in part]), rows_of(batch.micro_batches)
            assert other.keys() == expected.keys()
            for sample, values in expected.items():
                assert values.keys() == other[sample].keys()
                assert all(torch.equal(values[name], other[sample][name]) for name in values)
        for loader in loaders:
            loader.close()


def test_a_mixture_weighs_sources_of_other_roles(folder: Path) -> None:
    weights = {"text": 0, "pictures": 0, "sounds": 1, "spoken": 1, "silent": 0}
    with load(folder, mixture=MixtureConfig(weights=weights)) as loader:
        batches = [next(loader) for _ in range(20)]
    drawn = Counter(kind_of(sample) for batch in batches for sample, _, _ in batch.spans)
    assert drawn.keys() == {"sounds", "spoken"}
    costs = {s.name: s.tokens / s.samples for s in Corpus.load([str(folder / kind) for kind in KINDS]).sources()}
    shares = drawn["sounds"] * costs["sounds"], drawn["spoken"] * costs["spoken"]
    assert shares[0] == pytest.approx(shares[1], rel=0.1)


def test_images_alone_first_have_the_tokenizer_of_the_text(folder: Path) -> None:
    with load(folder, ("silent", "text")) as loader:
        micros = [micro for _ in range(2) for micro in next(loader).micro_batches]
        assert loader.tokenizer.vocab_size > 256
    assert all(micro.has("image")[row] != micro.has("tokens")[row] for micro in micros for row in range(2))


def test_packed_rows_mix_media_and_text_which_alone_is_cut(folder: Path) -> None:
    """A text longer than a row is cut as ever; a sample with an image never is."""
    with load(folder, ("text", "pictures"), rows="packed", views=[], sequence_length=24) as loader:
        batches = [next(loader) for _ in range(8)]
    assert [e["why"][:27] for batch in batches for e in batch.quarantined] == ["the image cannot be decoded"]
    spans = [span for batch in batches for span in batch.spans]
    assert {KINDS[s >> 40] for s, _, _ in spans} == {"text", "pictures"}
    assert any(start > 0 for sample, start, _ in spans if kind_of(sample) == "text")
    assert all(start == 0 for sample, start, _ in spans if kind_of(sample) == "pictures")
    media = sum(len(micro.media) for batch in batches for micro in batch.micro_batches)
    assert 0 < media <= sum(kind_of(sample) == "pictures" for sample, _, _ in spans)


def test_tokenised_text_beside_pictures(folder: Path, tmp_path: Path) -> None:
    config = PrepareConfig(inputs=[str(folder / "text.parquet")], out=str(tmp_path / "ids"), tokenize=True,
                           **tokenizer(folder))  # fmt: skip
    prepare(config)
    data = DataConfig(manifest=[str(folder / "pictures"), str(tmp_path / "ids")], rows="samples", views=VIEWS)
    with build_loader(data, seed=1, batch_rows=8, micro_batch=8, rank=0, world=1) as loader:
        (micro,) = next(loader).micro_batches
        texts = [loader.tokenizer.decode(ids[: length - 1].tolist()) for ids, length in
                 zip(micro.values["tokens"], micro.lengths["tokens"], strict=True)]  # fmt: skip
    for row, sample in enumerate(micro.samples):
        assert not micro.good[row] or texts[row].startswith("words alone" if sample >> 40 else "seen")


def test_heldout_samples_of_all_roles(folder: Path) -> None:
    config = DataConfig(manifest=[str(folder / kind) for kind in KINDS], rows="samples", views=VIEWS)
    micros: list[Any] = [micro for micro, _ in heldout_batches(config, 2, 0, 1)]
    assert len(rows_of(micros)) == (COUNT // 3) * len(KINDS)


def test_a_batch_where_only_those_with_an_image_count(folder: Path) -> None:
    with load(folder) as loader:
        micros = next(loader).micro_batches
    for micro in micros:
        assert micro.where("image", "tokens").good == [kind_of(s) == "pictures" for s in micro.samples]
        assert micro.where().good == micro.good


def test_what_two_have_must_be_alike(folder: Path, tmp_path: Path) -> None:
    def other(name: str, kind: str, **options: Any) -> list[str]:
        out = str(tmp_path / name)
        prepare(PrepareConfig(inputs=[str(folder / f"{kind}.parquet")], out=out, **options))
        return [str(folder / "pictures"), out]

    with pytest.raises(UserError, match="pictures and .*words do not go together: tokenizer "):
        Corpus.load(other("words", "text", vocab_size=270))
    rule = {"image": {"patch": 4}}
    with pytest.raises(UserError, match="do not go together: costs of image .*'patch': 16.* and .*'patch': 4"):
        Corpus.load(other("fine", "silent", image="image", costs=rule))
    Corpus.load(other("sounds", "sounds", audio="audio", costs=rule))  # of a role that it has not
