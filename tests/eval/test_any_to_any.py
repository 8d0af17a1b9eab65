"""Generation of any modality: from a checkpoint and from its export alike, each answer within its segment."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from millrace.core.config import build
from millrace.core.errors import UserError
from millrace.data.modalities.base import modality
from millrace.engine.export import BESIDE, export
from millrace.eval.any_to_any import ABOUT, AnyToAny, Medium
from millrace.eval.decoding import Sampling
from millrace.models.bridge import build_sized
from millrace.models.codec import CodecConfig
from millrace.models.config import ModelConfig
from millrace.models.vocabulary import Vocabulary, closing, opening, tags
from tests.handmade import add_to_checkpoint, small_model, small_tokenizer, write_checkpoint

SIZES: dict[str, dict[str, Any]] = {
    "image": {"widths": [8, 8], "strides": [2, 2], "latent": 4, "codes": 16},
    "audio": {"modality": "audio", "widths": [8], "strides": [2], "latent": 4, "codes": 12,
              "mel": {"rate": 8000, "window": 64, "hop": 32, "bands": 16}},
}  # fmt: skip
VIEWS: dict[str, dict[str, Any]] = {
    "image": {"role": "image", "size": 14},
    "audio": {"role": "audio", "rate": 8000, "seconds": 0.05},
}
ROWS = ["image > text", "text > image", "audio > text image", "text"]


def png(seed: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def wav(seed: int, frames: int = 700) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 8000, frames, "NONE", ""))
        file.writeframes(np.random.default_rng(seed).integers(-9000, 9000, frames, np.int16).tobytes())
    return out.getvalue()


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the objective writes it."""
    known = small_tokenizer().extended({}, tags(["image", "audio"]))
    ids = {tag: int(known.backend.token_to_id(tag)) for tag in tags(["image", "audio"])}  # type: ignore[arg-type]
    vocabulary = Vocabulary.lay_out(small_tokenizer().vocab_size, ids, {"image": 16, "audio": 12})
    path = write_checkpoint(tmp_path_factory.mktemp("run"), small_model(vocab_size=384), known)
    fixed, about = {}, {"vocabulary": vocabulary.to_dict(), "rows": ROWS, "longest": 64}
    files = {f"{BESIDE}{ABOUT}": json.dumps(about)}
    for name, sizes in SIZES.items():
        codec = build_sized(ModelConfig(kind="codec", config=sizes), CodecConfig, 0)
        fixed |= {f"codecs.{name}.{key}": tensor for key, tensor in codec.state_dict().items()}
        codec.config.architectures = ["Codec"]
        files[f"{BESIDE}codecs/{name}/config.json"] = codec.config.to_json_string(use_diff=False)
        files[f"{BESIDE}codecs/{name}/view.json"] = json.dumps(VIEWS[name])
    add_to_checkpoint(path, fixed, files)
    return path


@pytest.fixture(scope="module")
def run(step: Path) -> AnyToAny:
    return AnyToAny.open(step)


@pytest.fixture(scope="module")
def exported(step: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    return Path(export(step, out).path)


PROMPTS: list[dict[str, Any]] = [{"text": "The mill"}, {"image": png(0)}, {"audio": wav(1), "text": "turns"}]
SIZE = {"image": (14, 14, 3), "audio": (384,)}


@pytest.mark.parametrize("to", ["text", "image", "audio"])
@pytest.mark.parametrize("how", [Sampling(), Sampling(guidance=2.0, seed=3), Sampling(temperature=0)])
def test_an_export_answers_as_its_checkpoint(run: AnyToAny, exported: Path, to: str, how: Sampling) -> None:
    other = AnyToAny.from_pretrained(exported)
    for prompt in PROMPTS:
        written = run.write([prompt], to, how)
        assert other.write([prompt], to, how) == written
        (made,), (again,) = (each.generate([prompt], to, how) for each in (run, other))
        if to == "text":
            assert made == again
            continue
        assert np.array_equal(made, again) and made.shape == SIZE[to]
        assert made.dtype == (np.uint8 if to == "image" else np.float32) and np.isfinite(made).all()


def test_an_export_is_a_folder_of_transformers(run: AnyToAny, exported: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(60)[None] * 5 % 380
    torch.testing.assert_close(model(input_ids=ids).logits, run.model(input_ids=ids).logits)
    for name in SIZES:
        kept = load_file(exported / "codecs" / name / "model.safetensors")
        assert kept.keys() == run.media[name].codec.state_dict().keys()
        assert all(torch.equal(tensor, run.media[name].codec.state_dict()[key]) for key, tensor in kept.items())
    assert AnyToAny.open(exported).templates == run.templates


@pytest.mark.parametrize("to", ["text", "image", "audio"])
def test_answers_stay_in_their_segment(run: AnyToAny, to: str) -> None:
    count = {"text": None, "image": 16, "audio": 7}[to]  # 14 pixels are 4 strides of 4; 400 frames 13 hops
    for seed in range(5):
        for answer in run.write([{"text": "the"}, {"image": png(seed)}], to, Sampling(seed=seed, temperature=3.0)):
            assert all(0 <= token < len(run.vocabulary.segment(to)) for token in answer)
            assert count is None or len(answer) == count
            assert to != "text" or run.tokenizer.eos_id not in answer


def test_prompts_are_laid_out_as_in_training(run: AnyToAny) -> None:
    known, bos = run.vocabulary.tags, run.tokenizer.bos_id
    row = run.row({"text": "the", "audio": wav(0)}, "image")
    assert row[:2].tolist() == [bos, known[opening("audio")]]  # the template's order, not the prompt's
    assert row[-1] == known[opening("image")] and len(row) == 1 + 9 + len(run.tokenizer.encode(["the"])[0]) + 1
    begun = run.row({"text": "the", "image": png(0)}, "text")
    words = run.tokenizer.encode(["the"])[0].tolist()
    assert begun[-len(words) - 1 :].tolist() == [known[closing("image")], *words]


def test_files_are_looked_at_as_the_codec_was_trained(run: AnyToAny) -> None:
    raw = png(4)
    view = build(modality("image").view, VIEWS["image"])
    seen = view.make(modality("image").decode(raw), raw, np.random.default_rng(0))
    assert np.array_equal(run.media["image"].encode(raw), run.media["image"].encode(seen))
    codes = run.media["image"].encode(raw)
    assert codes.tolist() == run.media["image"].codec.encode(torch.tensor(seen)[None]).flatten().tolist()


def test_sounds_of_any_length_end_themselves(run: AnyToAny) -> None:
    any_length = Medium.of(run.media["audio"].codec, json.dumps(VIEWS["audio"] | {"seconds": 0.0}))
    other = AnyToAny(run.model, run.tokenizer, {"vocabulary": run.vocabulary.to_dict(), "rows": ROWS, "longest": 64},
                     {**run.media, "audio": any_length})  # fmt: skip
    found = other.write([{"text": "the"}] * 8, "audio", Sampling(temperature=2.0))
    assert len({len(codes) for codes in found}) > 1
    (made,) = other.generate([{"text": "the"}], "audio", Sampling(temperature=2.0))
    assert made.shape == ((2 * len(found[0]) - 1) * 32,)


@pytest.mark.parametrize(
    ("prompt", "to", "why"),
    [
        ({"text": "a"}, "video", "the model has no video; it has text, image, audio"),
        ({"smell": b""}, "text", "the model has no smell"),
        ({"text": "mill " * 60}, "image", "positions, and an answer of image takes 16; shorten the prompt"),
    ],
)
def test_bad_prompts(run: AnyToAny, prompt: dict[str, Any], to: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        run.generate([prompt], to)


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was not trained with objective.kind = 'any_to_any'"):
        AnyToAny.open(write_checkpoint(tmp_path, small_model()))
