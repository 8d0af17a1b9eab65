"""Media that are encoded into shards of codes while they are prepared, by coders that know no model."""

from __future__ import annotations

import gc
import io
import json
import re
import shutil
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from millrace.core.errors import UserError
from millrace.data import coding
from millrace.data.corpus import Corpus
from millrace.data.manifest import Manifest
from millrace.data.modalities.audio import AudioView
from millrace.data.modalities.codes import unpack
from millrace.data.modalities.image import ImageView
from millrace.data.prepare import PrepareConfig, Summary, prepare

COUNT = 90  # samples of a file: several batches


class FakeCoder:
    """Codes are sums of rows, or of runs of a sound; it is counted how many values are alive."""

    def __init__(self, view: Any, sha256: str = "a" * 64) -> None:
        self.view, self.sha256 = view, sha256
        self.batches: list[int] = []
        self.alive = self.most = 0
        self.fails_after: int | None = None

    def encode(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        if self.fails_after is not None and len(self.batches) >= self.fails_after:
            raise KeyboardInterrupt
        self.batches.append(len(values))
        for value in values:
            self.alive += 1
            weakref.finalize(value, self._gone)
        self.most = max(self.most, self.alive)
        return [
            value.reshape(4, -1).astype(np.float64).sum(1).round().astype(int).reshape(2, 2) ** 2 for value in values
        ]

    def _gone(self) -> None:
        self.alive -= 1

    def save(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"sha": self.sha256}))


def images() -> dict[str, FakeCoder]:
    return {"image": FakeCoder(ImageView(size=8))}


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 10, 3)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for part in range(3):
        numbers = range(part * COUNT, (part + 1) * COUNT)
        table = pa.table({"png": [png(n) for n in numbers], "caption": [f"picture {n}" for n in numbers]})
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=20)
    return folder


def run(out: Path, inputs: Path | str, coders: Any = None, **options: Any) -> Summary:
    named: dict[str, Any] = {"text": "caption", "image": "png", "vocab_size": 270, "shard_size": 2000} | options
    return prepare(PrepareConfig(inputs=[str(inputs)], out=str(out), **named), coders=coders or images())


def stored(folder: Path) -> list[tuple[str, list[Any]]]:
    corpus = Corpus.load(str(folder))
    from millrace.data.reader import ShardReader

    records: Any = ShardReader(corpus).read(np.arange(corpus.samples))
    return [(record["text"], unpack(record["image_codes"]).tolist()) for record in records]


def expected(numbers: Sequence[int]) -> list[tuple[str, list[Any]]]:
    coder, view = images()["image"], ImageView(size=8)
    seen = [view.make(np.asarray(Image.open(io.BytesIO(png(n)))), b"", np.random.default_rng(0)) for n in numbers]
    return [(f"picture {n}", codes.tolist()) for n, codes in zip(numbers, coder.encode(seen), strict=True)]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "raw" / "codes").glob("*"))}


def test_media_become_codes_in_shards_that_are_indexed(pictures: Path, tmp_path: Path) -> None:
    coders = images()
    summary = run(tmp_path / "out", pictures, coders)
    assert summary.train[0]["documents"] == 3 * COUNT and not summary.skipped
    assert stored(tmp_path / "out") == expected(range(3 * COUNT))
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.columns == {"text": "text", "image_codes": "image_codes"}
    assert manifest.codecs == {"image_codes": "a" * 64} and manifest.costs == {}
    assert len(manifest.shards) == 6, "of the wanted size, and within a file"
    assert json.loads((tmp_path / "out" / "codecs" / "image" / "config.json").read_text()) == {"sha": "a" * 64}
    lengths = manifest.entries(np.arange(5)).tokens
    assert (lengths > 4).all(), "4 codes, text and its end"
    assert run(tmp_path / "out", pictures).already_done
    other = run(tmp_path / "other", pictures, {"image": FakeCoder(ImageView(size=8), "b" * 64)})
    assert other.fingerprint != summary.fingerprint, "a codec belongs to it"


def test_memory_is_that_of_a_batch(pictures: Path, tmp_path: Path) -> None:
    coders = images()
    run(tmp_path / "out", pictures, coders)
    gc.collect()
    assert coders["image"].alive <= 1 and sum(coders["image"].batches) == 3 * COUNT
    assert coders["image"].most <= 32 + 1, "that of the last batch may be held by the loop"


@pytest.mark.parametrize("batches", [0, 1, 4, 7])
def test_an_interrupted_call_goes_on_behind_the_last_shard(pictures: Path, tmp_path: Path, batches: int) -> None:
    run(tmp_path / "whole", pictures)
    coders = images()
    coders["image"].fails_after = batches
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", pictures, coders)
    kept = {name for name in shards(tmp_path / "out") if name.endswith(".parquet")}
    coders = images()
    summary = run(tmp_path / "out", pictures, coders)
    assert sum(coders["image"].batches) == 3 * COUNT - sum(
        pq.read_metadata(tmp_path / "out" / "raw" / "codes" / name).num_rows for name in kept
    )
    assert {n: raw for n, raw in shards(tmp_path / "out").items() if n.endswith("t")} == {
        n: raw for n, raw in shards(tmp_path / "whole").items() if n.endswith("t")
    }, "the same bytes"
    assert summary.fingerprint == Manifest.load(tmp_path / "whole").fingerprint


def test_another_codec_is_refused_in_the_same_folder_and_the_same_corpus(pictures: Path, tmp_path: Path) -> None:
    other = {"image": FakeCoder(ImageView(size=8), "b" * 64)}
    run(tmp_path / "out", pictures / "0.parquet")
    with pytest.raises(
        UserError, match="prepared with other options .codecs was .*aaaa.* and is now .*bbbb.*new folder"
    ):
        run(tmp_path / "out", pictures / "0.parquet", other)
    with pytest.raises(UserError, match="prepared with other options .*codecs was .*aaaa.* and is now None"):
        prepare(PrepareConfig(inputs=[str(pictures / "0.parquet")], out=str(tmp_path / "out"), text="caption",
                              image="png", vocab_size=270, shard_size=2000))  # fmt: skip
    coders = images()
    coders["image"].fails_after = 2
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "half", pictures / "0.parquet", coders)
    with pytest.raises(UserError, match="half prepared with other options .codecs was .*aaaa.* and is now .*bbbb"):
        run(tmp_path / "half", pictures / "0.parquet", other)
    run(tmp_path / "other", pictures / "1.parquet", other, tokenizer=str(tmp_path / "out" / "tokenizer"))
    with pytest.raises(UserError, match="do not go together: the codec of image_codes aaaaaaaaaaaa and bbbbbbbbbbbb"):
        Corpus.load([str(tmp_path / "out"), str(tmp_path / "other")])


def test_files_that_are_added_are_appended(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("0.parquet", "2.parquet"):
        shutil.copy2(pictures / name, tmp_path / "in")
    first = run(tmp_path / "out", tmp_path / "in")
    shutil.copy2(pictures / "1.parquet", tmp_path / "in")
    coders = images()
    second = run(tmp_path / "out", tmp_path / "in", coders)
    assert sum(coders["image"].batches) == COUNT and second.added_files
    numbers = [*range(COUNT), *range(2 * COUNT, 3 * COUNT), *range(COUNT, 2 * COUNT)]
    assert stored(tmp_path / "out") == expected(numbers), "behind those that were there"
    assert Manifest.load(tmp_path / "out").prefix(first.fingerprint)
    (tmp_path / "in" / "0.parquet").write_bytes((pictures / "1.parquet").read_bytes())
    with pytest.raises(UserError, match="0.parquet changed since its media were encoded; prepare into a new folder"):
        run(tmp_path / "out", tmp_path / "in")
    (tmp_path / "in" / "0.parquet").unlink()
    with pytest.raises(UserError, match="0.parquet is gone since its media were encoded"):
        run(tmp_path / "out", tmp_path / "in")


def test_a_file_that_changed_before_all_was_done_is_encoded_again(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy2(pictures / "0.parquet", tmp_path / "in")
    shutil.copy2(pictures / "1.parquet", tmp_path / "in")
    coders = images()
    coders["image"].fails_after = 4
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", tmp_path / "in", coders)
    (tmp_path / "in" / "0.parquet").unlink()
    shutil.copy2(pictures / "2.parquet", tmp_path / "in" / "0.parquet")
    run(tmp_path / "out", tmp_path / "in")
    assert stored(tmp_path / "out") == expected([*range(2 * COUNT, 3 * COUNT), *range(COUNT, 2 * COUNT)])


def huge() -> bytes:
    """A PNG whose header says 100,000 x 100,000 pixels."""
    raw = bytearray(png(0))
    raw[16:24] = (100_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    return bytes(raw)


def wav(corpora: Any, frames: int, rate: int = 8000) -> bytes:
    found: bytes = corpora.make_wav(frames, rate)
    return found


def test_what_cannot_be_encoded_is_named_or_stops(corpora: Any, tmp_path: Path) -> None:
    """Nothing is lost: every sample is there, or is named with the reason."""
    good, sound = png(1), wav(corpora, 400)
    rows: list[tuple[Any, Any, str]] = [
        (good, sound, ""),
        (good[:60], sound, "the image cannot be encoded: a damaged PNG image"),
        (b"no image", sound, "the image cannot be encoded: not an image that can be read"),
        (huge(), sound, "the image cannot be encoded: .*pixels"),
        (None, sound, "row 4 of row group 0 is null"),
        (good, b"RIFF", "the audio cannot be encoded: not a sound that can be read"),
        (good, wav(corpora, 0), "the audio cannot be encoded: a WAV sound without frames"),
        (good, wav(corpora, 900, 16000), ""),
        (png(2), sound, ""),
    ]
    table = {"png": pa.array([row[0] for row in rows], pa.binary()), "wav": [row[1] for row in rows]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    coders = images() | {"audio": FakeCoder(AudioView(rate=8000, seconds=0.05))}
    named: dict[str, Any] = {"text": None, "audio": "wav"}
    with pytest.raises(UserError, match="a.parquet, document 1: the image cannot be encoded.*--on-bad skip"):
        run(tmp_path / "out", tmp_path / "a.parquet", coders, **named)
    summary = run(tmp_path / "out", tmp_path / "a.parquet", coders, **named, on_bad="skip")
    bad = [number for number, row in enumerate(rows) if row[2]]
    assert summary.train[0]["documents"] == len(rows) - len(bad) == 3
    for number, why in zip(bad, summary.skipped, strict=True):
        assert why.startswith(f"{tmp_path / 'a.parquet'}, document {number}: ")
        assert re.search(rows[number][2], why), why
    again = run(tmp_path / "out", tmp_path / "a.parquet", coders, **named, on_bad="skip")
    assert again.already_done and again.skipped == summary.skipped
    manifest = Manifest.load(tmp_path / "out")
    assert list(manifest.columns) == ["image_codes", "audio_codes"] and manifest.tokenizer is None
    assert manifest.entries(np.arange(3)).tokens.tolist() == [1 + (4 + 2) + (4 + 2)] * 3


def test_codes_that_are_none_leave_a_sample_out(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = FakeCoder.encode

    def encode(self: FakeCoder, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        codes = made(self, values)
        return [-code if number == 5 else code for number, code in enumerate(codes)]

    monkeypatch.setattr(FakeCoder, "encode", encode)
    with pytest.raises(UserError, match="document 5: the image cannot be encoded: codes from -"):
        run(tmp_path / "out", pictures / "0.parquet")
    summary = run(tmp_path / "out", pictures / "0.parquet", on_bad="skip")
    assert len(summary.skipped) >= 3 and summary.train[0]["documents"] == COUNT - len(summary.skipped)


def test_what_is_not_coded_is_kept(corpora: Any, tmp_path: Path) -> None:
    sounds = [wav(corpora, 400 + n) for n in range(4)]
    pq.write_table(pa.table({"png": [png(n) for n in range(4)], "wav": sounds}), tmp_path / "a.parquet")
    run(tmp_path / "out", tmp_path / "a.parquet", text=None, audio="wav", heldout=0.5, heldout_by="nth")
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.columns == {"audio": "audio", "image_codes": "image_codes"}
    found = corpora.read_samples(tmp_path / "out") + corpora.read_samples(tmp_path / "out" / "heldout")
    assert sorted(record["audio"] for record in found) == sorted(sounds)


def test_a_codec_of_what_is_not_there(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="samples have image_codes already"):
        run(tmp_path / "out", pictures, media={"image_codes": "codes"})
    with pytest.raises(UserError, match="a codec of 'audio', which samples do not have; add --audio COLUMN"):
        run(tmp_path / "out", pictures, {"audio": FakeCoder(AudioView())})
    with pytest.raises(ValueError, match="tokenize = true needs"):
        run(tmp_path / "out", pictures, tokenize=True)


def test_shards_are_the_same_on_any_number_of_ranks(pictures: Path, tmp_path: Path) -> None:
    """Each encodes every n-th file, in any order; then the first indexes."""
    run(tmp_path / "alone", pictures)

    class Ranks:
        def __init__(self, rank: int) -> None:
            self.rank, self.size = rank, 2

        def on_main(self, action: Any) -> Any:
            return action() if self.rank == 0 and not self.waits else None

        waits = False

        def barrier(self) -> None:
            raise TimeoutError

    for rank in (0, 1):
        coders, ranks = images(), Ranks(rank)
        config = PrepareConfig(inputs=[str(pictures)], out=str(tmp_path / "out"), text="caption", image="png",
                               vocab_size=270, shard_size=2000)  # fmt: skip
        with pytest.raises(TimeoutError):
            prepare(config, coders=coders, ranks=ranks)
        assert sum(coders["image"].batches) == (COUNT if rank else 2 * COUNT)
    coders = images()
    run(tmp_path / "out", pictures, coders)
    assert not coders["image"].batches and stored(tmp_path / "out") == stored(tmp_path / "alone")
    assert shards(tmp_path / "out") == shards(tmp_path / "alone")


def test_batches_are_bounded_in_bytes(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "_BATCH_BYTES", 5 * 8 * 8 * 3)
    coders = images()
    run(tmp_path / "out", pictures / "0.parquet", coders)
    assert max(coders["image"].batches) == 5
