"""Codecs as coders: from a run, a checkpoint, an export or what was saved, the same codes and hash; and `prepare`."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
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
from millrace.data.corpus import Corpus
from millrace.data.manifest import Manifest
from millrace.data.modalities.codes import unpack
from millrace.data.reader import ShardReader
from millrace.engine.export import export
from millrace.eval.coder import open_coder, stored_coder
from millrace.launch.cli import main
from tests.handmade import write_checkpoint
from tests.pretrain.samples_worker import objective_of
from tests.ranks import ROOT, environment, launch_world

SIZES: dict[str, Any] = {"widths": [8, 16], "strides": [2, 2], "latent": 4, "codes": 16}
VIEWS = """views = [
    {role = "image", size = 16, scale = [0.5, 1.0], flip = true},
    {role = "audio", rate = 8000, gain = 3.0},
]
[objective]
kind = "codec"
"""


def write_run(folder: Path, settings: str = VIEWS, **config: Any) -> Path:
    """A run directory of a codec; the codebook's directions are drawn."""
    module: Any = objective_of({"objective": {"kind": "codec"}, "model": {"kind": "codec", "config": SIZES | config}})
    write_checkpoint(folder / "checkpoints", module.modules["model"], settings=settings)
    return folder


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `image`, `audio` and `fsq`."""
    folder = tmp_path_factory.mktemp("codecs")
    write_run(folder / "image")
    write_run(folder / "audio", modality="audio", strides=[4, 4])
    write_run(folder / "fsq", bottleneck="fsq", levels=[4, 4])
    return folder


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (16, 20, 3)).astype(np.uint8)


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(number)).save(file, "PNG")
    return file.getvalue()


def wav(frames: int) -> bytes:
    file = io.BytesIO()
    sound = np.random.default_rng(frames).uniform(-0.5, 0.5, frames)
    soundfile.write(file, sound.astype(np.float32), 8000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def stored(folder: Path) -> list[Any]:
    corpus = Corpus.load(str(folder))
    return list(ShardReader(corpus).read(np.arange(corpus.samples)))


def test_the_same_from_a_run_a_checkpoint_an_export_and_what_was_saved(codecs: Path, tmp_path: Path) -> None:
    export(codecs / "image", tmp_path / "exported")
    (tmp_path / "saved").mkdir()
    first = open_coder("image", codecs / "image")
    first.save(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors", "view.json"]
    assert json.loads((tmp_path / "saved" / "view.json").read_text()) == {"role": "image", "size": 16}
    (step,) = (codecs / "image" / "checkpoints").iterdir()
    values = [picture(n)[:, :16] for n in range(5)]
    expected = first.model.encode(torch.from_numpy(np.stack(values))).numpy()
    assert expected.shape == (5, 4, 4) and len(np.unique(expected)) > 4
    for path in (step, tmp_path / "exported", tmp_path / "saved"):
        other = open_coder("image", path)
        assert other.sha256 == first.sha256 and other.view == first.view
        assert np.array_equal(other.encode(values), expected)
    assert open_coder("image", codecs / "fsq").sha256 != first.sha256
    (tmp_path / "saved" / "view.json").write_text('{"role": "image", "size": 8}')
    assert open_coder("image", tmp_path / "saved").sha256 != first.sha256, "codes depend on the view"


def test_sounds_of_several_lengths(codecs: Path) -> None:
    coder = open_coder("audio", codecs / "audio")
    sounds = [np.random.default_rng(n).standard_normal(n).astype(np.float32) for n in (160, 160, 300, 160)]
    codes = coder.encode(sounds)
    assert [len(each) for each in codes] == [10, 10, 19, 10]
    for sound, each in zip(sounds, codes, strict=True):
        assert np.array_equal(coder.encode([sound])[0], each)


def test_mistakes(codecs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a codec of 'image', not of 'audio'; write --codec image="):
        open_coder("audio", codecs / "image")
    with pytest.raises(UserError, match="bottleneck 'kl' has no codes"):
        open_coder("image", write_run(tmp_path / "kl", bottleneck="kl"))
    with pytest.raises(UserError, match=r"its run has no view in data.views. Write view.json"):
        open_coder("image", write_run(tmp_path / "blind", settings=""))
    with pytest.raises(UserError, match="nowhere is neither a run directory"):
        open_coder("image", tmp_path / "nowhere")
    folder = tmp_path / "exported"
    export(codecs / "image", folder)
    (folder / "view.json").write_text("[1]")
    with pytest.raises(UserError, match="view.json is not a readable view"):
        open_coder("image", folder)
    for text in ("image", "image="):
        assert main(["prepare", "x", "--image", "png", "--out", str(tmp_path / "out"), "--codec", text]) == 1


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for part in range(3):
        numbers = range(10 * part, 10 * part + 10)
        columns: dict[str, Any] = {"png": [png(n) for n in numbers], "text": [f"picture {n}" for n in numbers]}
        columns["wav"] = [wav(400 + 10 * n) for n in numbers]
        pq.write_table(pa.table(columns), tmp_path / "in" / f"{part}.parquet")
    return tmp_path / "in"


def arguments(codecs: Path, shards: Path, out: str) -> list[str]:
    media = ["--text", "text", "--image", "png", "--audio", "wav"]
    media += [f"--codec=image={codecs / 'image'}", f"--codec=audio={codecs / 'audio'}", "--heldout", "0.2"]
    return ["prepare", str(shards), "--out", str(shards.parent / out), "--vocab-size", "260", *media]


def test_prepare_with_codecs_alone_and_on_two_ranks(codecs: Path, shards: Path) -> None:
    assert main(arguments(codecs, shards, "alone")) == 0
    alone, ranks = shards.parent / "alone", shards.parent / "ranks"
    manifest, coder = Manifest.load(alone), open_coder("image", codecs / "image")
    assert manifest.codecs == {"image_codes": coder.sha256, "audio_codes": open_coder("audio", codecs / "audio").sha256}
    assert open_coder("image", alone / "codecs" / "image").sha256 == coder.sha256, "what decodes them lies beside them"
    for part in (alone, alone / "heldout"):
        assert stored_coder(Corpus.load(str(part)), "image").sha256 == coder.sha256
    records = stored(alone) + stored(alone / "heldout")
    assert len(records) == 30
    for record in records:
        number = int(record["text"].split()[1])
        view = picture(number)[:, 2:18]  # its middle
        assert np.array_equal(unpack(record["image_codes"]), coder.encode([view])[0])
        assert unpack(record["audio_codes"]).shape == (-(-(400 + 10 * number) // 16),)
    codes, said = launch_world("millrace.launch", 2, arguments(codecs, shards, "ranks"))
    assert codes == [0, 0], said
    assert [text.splitlines().count(str(ranks)) for text in said] == [1, 0], "one of them tells of it"
    assert Manifest.load(ranks).fingerprint == manifest.fingerprint
    ours, theirs = ({p.name: p.read_bytes() for p in (f / "raw" / "codes").iterdir()} for f in (alone, ranks))
    assert ours == theirs
    shutil.rmtree(alone / "codecs" / "image")
    shutil.copytree(codecs / "fsq", alone / "codecs" / "image")
    with pytest.raises(UserError, match="is not the one that made the codes of .*alone .*; put that one back"):
        stored_coder(Corpus.load(str(alone)), "image")


@pytest.mark.slow
def test_a_bad_sample_on_one_rank_ends_them_all(codecs: Path, shards: Path) -> None:
    shutil.copy(shards / "0.parquet", shards / "3.parquet")
    pq.write_table(pa.table({"png": [b"bad"], "text": ["bad"], "wav": [b"bad"]}), shards / "1.parquet")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "millrace.launch"]
    done = subprocess.run(
        [*launcher, *arguments(codecs, shards, "ranks")],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 1
    assert "1.parquet, document 0: the image cannot be encoded: not an image" in done.stderr
