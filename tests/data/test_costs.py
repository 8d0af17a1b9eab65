"""Costs of samples of any roles: the rules, and what `prepare` writes of them."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.data.costs import Costs
from millrace.data.manifest import Manifest
from millrace.data.modalities.audio import AudioCost
from millrace.data.modalities.image import ImageCost
from millrace.data.prepare import PrepareConfig, Summary, prepare
from millrace.data.sources.base import BadSample, checksum
from millrace.data.tokenizer import load_tokenizer

SIDES = st.integers(1, 20_000)


@given(SIDES, SIDES, st.integers(1, 64), st.integers(1, 4096))
def test_an_image_takes_a_grid_of_patches_that_is_bounded(width: int, height: int, patch: int, most: int) -> None:
    columns, rows = ImageCost(patch=patch, most=most).grid(width, height)
    full = ceil(Fraction(width, patch)), ceil(Fraction(height, patch))
    assert columns >= 1 and rows >= 1 and columns * rows <= most
    if full[0] * full[1] <= most:
        assert (columns, rows) == full
    else:
        assert columns <= full[0] and rows <= full[1]
    assert ImageCost(patch=patch, most=most).grid(height, width) == (rows, columns) or min(columns, rows) == 1


@settings(max_examples=200)
@given(st.integers(100, 4000), st.integers(100, 4000))
def test_large_images_are_scaled_as_by_qwen2_vl(width: int, height: int) -> None:
    reference = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl").smart_resize
    rule = ImageCost(patch=16, most=256)
    if -(-width // 16) * -(-height // 16) > 256 and max(width, height) < 100 * min(width, height):
        scaled = reference(height, width, factor=16, min_pixels=1, max_pixels=256 * 256)
        if round(height / 16) * round(width / 16) > 256:  # it scales down where the rounded size is too large
            assert rule.grid(width, height) == (scaled[1] // 16, scaled[0] // 16)


@given(st.integers(0, 10**9), st.integers(1, 400_000), st.integers(1, 1000))
def test_a_sound_takes_a_position_for_every_hop_begun(frames: int, rate: int, hop: int) -> None:
    from millrace.data.decoders import audio

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio, "length", lambda raw: (frames, rate, 2))
        assert AudioCost(hop_ms=hop).positions(b"") == ceil(Fraction(frames * 1000, rate * hop))


def test_positions_come_from_headers(corpora: Any) -> None:
    costs = Costs(image=ImageCost(patch=10), audio=AudioCost(hop_ms=100))
    png, wav = corpora.make_png(41, 20), corpora.make_wav(8001, 8000)
    assert costs.positions({"text": "a"}) == 0
    assert costs.positions({"image": png}) == 5 * 2
    assert costs.positions({"image": png, "audio": wav, "text": "a"}) == 5 * 2 + 11
    bad = costs.positions({"image": b"no image"})
    assert isinstance(bad, BadSample) and bad.why.startswith("the image cannot be read: ")
    assert isinstance(costs.positions({"audio": b"RIFF"}), BadSample)


@pytest.mark.parametrize(("role", "rule"), [("image", {"patch": 0}), ("image", {"most": 0}), ("audio", {"hop_ms": -1})])
def test_rules_are_positive(role: str, rule: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"costs.{role}.* must be at least 1"):
        {"image": ImageCost, "audio": AudioCost}[role](**rule)


def run(out: Path, source: Path, **options: Any) -> Summary:
    return prepare(PrepareConfig(inputs=[str(source)], out=str(out), **{"vocab_size": 300} | options))


@pytest.fixture
def media(corpora: Any, tmp_path: Path) -> Path:
    """Twelve samples of a caption, an image and a sound."""
    columns = {
        "caption": [f"picture number {i}" for i in range(12)],
        "jpg": [corpora.make_png(10 * i + 1, 33) for i in range(12)],
        "flac": [corpora.make_wav(1000 * i + 500, 8000) for i in range(12)],
    }
    pq.write_table(pa.table(columns), tmp_path / "media.parquet", row_group_size=5)
    return tmp_path / "media.parquet"


ROLES = {"text": "caption", "image": "jpg", "audio": "flac"}
RULES: Any = {"image": {"patch": 16, "most": 6}, "audio": {"hop_ms": 50}}


def test_every_sample_of_several_roles_is_indexed(media: Path, corpora: Any, tmp_path: Path) -> None:
    summary = run(tmp_path / "out", media, **ROLES, costs=RULES)
    manifest, tokenizer = Manifest.load(tmp_path / "out"), load_tokenizer(tmp_path / "out" / "tokenizer")
    assert manifest.columns == ROLES and manifest.tokenizer == tokenizer.sha256 and manifest.counted
    assert manifest.costs == {"image": {"patch": 16, "most": 6}, "audio": {"hop_ms": 50}}
    assert Costs.stored(manifest.costs) == Costs.stored(RULES)
    entries, records = manifest.entries(np.arange(12)), corpora.read_samples(tmp_path / "out")
    texts = [f"picture number {i}" for i in range(12)]
    images = [np.prod(ImageCost(**RULES["image"]).grid(10 * i + 1, 33)) for i in range(12)]
    sounds = [ceil((1000 * i + 500) / 400) for i in range(12)]
    counted = zip(tokenizer.encode(texts), images, sounds, strict=True)
    expected = [len(ids) + 1 + image + sound for ids, image, sound in counted]
    assert entries.tokens.tolist() == expected and max(images) == 6
    assert entries.bytes.tolist() == [len(t) for t in texts]
    assert [r["text"] for r in records] == texts and records[3]["image"] == corpora.make_png(31, 33)
    assert entries.check.tolist() == [checksum(r) for r in records]
    assert list(zip(entries.at.tolist(), entries.extent.tolist(), strict=True)) == [(i // 5, i % 5) for i in range(12)]
    assert summary.train == [{"name": "media", "documents": 12, "bytes": sum(map(len, texts)), "tokens": sum(expected)}]


def test_costs_of_media_alone_need_no_tokenizer(media: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", media, image="jpg")
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.columns == {"image": "jpg"} and manifest.tokenizer is None and manifest.counted
    expected = [1 + np.prod(ImageCost().grid(10 * i + 1, 33)) for i in range(12)]
    assert manifest.entries(np.arange(12)).tokens.tolist() == expected
    assert manifest.bytes == 0 and not (tmp_path / "out" / "tokenizer").exists()
    run(tmp_path / "uncounted", media, **ROLES, count_tokens=False)
    assert not Manifest.load(tmp_path / "uncounted").counted


def test_a_rule_belongs_to_the_fingerprint(media: Path, tmp_path: Path) -> None:
    found = [
        run(tmp_path / str(number), media, image="jpg", costs=costs).fingerprint
        for number, costs in enumerate(
            [
                {},
                {"image": {"most": 10**6}},  # no image is so large: the same costs, but not of every image
                {"audio": {"hop_ms": 10}},  # of a role that is not there
            ]
        )
    ]
    assert found[0] != found[1] and found[0] == found[2]
    with pytest.raises(UserError, match="prepared with other options .costs was .*'patch': 16.* and is now"):
        run(tmp_path / "0", media, image="jpg", costs={"image": {"patch": 8}})


def test_samples_are_held_out_by_all_of_their_values(corpora: Any, tmp_path: Path) -> None:
    images = [corpora.make_png(1 + i % 40, 2) for i in range(80)]
    pq.write_table(pa.table({"jpg": images}), tmp_path / "a.parquet")
    run(tmp_path / "out", tmp_path / "a.parquet", image="jpg", heldout=0.3)
    parts = [{r["image"] for r in corpora.read_samples(tmp_path / "out" / part)} for part in ("", "heldout")]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 40


@pytest.mark.parametrize("bad", [b"no image", None])
def test_an_image_that_cannot_be_read_stops_or_is_left_out(corpora: Any, tmp_path: Path, bad: bytes | None) -> None:
    images = [corpora.make_png(9, 9), bad, corpora.make_png(20, 9)]
    pq.write_table(pa.table({"jpg": pa.array(images, pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet, document 1: .*--on-bad skip"):
        run(tmp_path / "out", tmp_path / "a.parquet", image="jpg")
    summary = run(tmp_path / "out", tmp_path / "a.parquet", image="jpg", on_bad="skip")
    assert summary.train[0]["documents"] == 2 and "document 1" in summary.skipped[0]


@pytest.mark.parametrize("kind", [pa.uint16(), pa.int64()])
def test_tokens_are_indexed_as_they_are(corpora: Any, tmp_path: Path, kind: pa.DataType) -> None:
    texts = corpora.make_documents(30)
    corpora.prepare_documents(tmp_path, texts)
    tokenizer = load_tokenizer(tmp_path / "corpus" / "tokenizer")
    ids = pa.array([i.tolist() for i in tokenizer.encode(texts)], pa.list_(kind))
    pq.write_table(pa.table({"ids": ids}), tmp_path / "ids.parquet", row_group_size=7)
    named = {"tokens": "ids", "tokenizer": str(tmp_path / "corpus" / "tokenizer")}
    run(tmp_path / "out", tmp_path / "ids.parquet", **named, heldout=0.2)
    parts = [Manifest.load(tmp_path / "out" / part) for part in ("", "heldout")]
    records = [corpora.read_samples(part.folder) for part in parts]
    for part, found in zip(parts, records, strict=True):
        assert part.columns == {"tokens": "ids"} and part.tokenizer == tokenizer.sha256
        entries = part.entries(np.arange(part.samples))
        assert entries.tokens.tolist() == [len(r["tokens"]) + 1 for r in found]
        assert entries.bytes.tolist() == [len(tokenizer.decode(r["tokens"]).encode()) for r in found]
    assert sorted(tokenizer.decode(r["tokens"]) for found in records for r in found) == sorted(texts)
    held = {tokenizer.decode(r["tokens"]) for r in records[1]}
    assert held and held < set(texts)


def test_tokens_of_another_tokenizer_are_refused(corpora: Any, tmp_path: Path) -> None:
    tokenizer = str(corpora.prepare_documents(tmp_path, ["some text"]) / "tokenizer")
    pq.write_table(pa.table({"ids": [[1, 2], [5, 50_256]]}), tmp_path / "ids.parquet")
    with pytest.raises(UserError, match="ids.parquet, document 1: token 50256 is outside the tokenizer's vocabulary"):
        run(tmp_path / "out", tmp_path / "ids.parquet", tokens="ids", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "ids"}, "tokens = 'ids' needs the tokenizer that they were made with"),
        ({"tokens": "ids", "tokenizer": "t", "text": "text"}, "and no other role"),
        ({"image": "jpg", "tokenize": True}, "tokenize = true needs .* samples of text alone"),
    ],
)
def test_roles_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**options)
