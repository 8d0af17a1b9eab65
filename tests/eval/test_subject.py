"""Opening what is evaluated, and refusing it clearly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.core.errors import UserError
from millrace.engine.export import export
from millrace.eval.subject import open_subject
from tests.handmade import SIZES, alter, small_model, small_tokenizer, write_checkpoint

IDS = torch.arange(40)[None] * 7 % 300


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits.detach()


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "llama"])
def test_run_checkpoint_and_export_are_the_same_model(kind: str, tmp_path: Path) -> None:
    model = small_model(kind)
    path = write_checkpoint(tmp_path / "run" / "checkpoints", model)
    export(path, tmp_path / "out")
    for source in (tmp_path / "run", path, tmp_path / "out"):
        subject = open_subject(source, dtype="fp32")
        assert (logits(subject.model) - logits(model)).abs().max() <= 1e-5, source
        assert not subject.model.training and subject.context == 64
        assert subject.tokenizer.sha256 == small_tokenizer().sha256
        assert subject.description["parameters"] == sum(p.numel() for p in model.parameters())
    assert open_subject(path).description["step"] == 7
    assert open_subject(path).description["manifests"] == ["f00d"]


def test_tied_weights_stay_one_tensor(tmp_path: Path) -> None:
    model = open_subject(write_checkpoint(tmp_path, small_model("gpt2"))).model
    assert model.lm_head.weight is model.transformer.wte.weight


def test_dtype_and_context(run: Path) -> None:
    subject = open_subject(run, dtype="bf16", context=16)
    assert subject.model.dtype == torch.bfloat16 and subject.context == 16
    with pytest.raises(UserError, match="a context of 65 tokens: give 2 to 64"):
        open_subject(run, context=65)


def test_missing_and_foreign_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory, checkpoint or folder ./nowhere; check the path"):
        open_subject("./nowhere")
    with pytest.raises(UserError, match="no checkpoint .*step-00000003: give a run directory"):
        open_subject(tmp_path / "step-00000003")
    with pytest.raises(UserError, match="neither a run directory .* nor a Hugging Face"):
        open_subject(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="run has no checkpoint yet"):
        open_subject(tmp_path / "run")
    (tmp_path / "model.bin").touch()
    with pytest.raises(UserError, match="model.bin is a file; give its folder"):
        open_subject(tmp_path / "model.bin")


def test_torn_and_altered_checkpoints(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, small_model("qwen3"))
    file = path / "rank-00001.safetensors"
    alter(file)
    with pytest.raises(UserError, match="rank-00001.safetensors was altered: its SHA-256 differs"):
        open_subject(path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"bytes, \d+ were written .torn."):
        open_subject(path)


def test_tokenizer_larger_than_the_vocabulary(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(write_checkpoint(tmp_path, small_model("qwen3")), out)
    spec = json.loads((out / "tokenizer.json").read_text())
    spec["added_tokens"] += [{**spec["added_tokens"][0], "id": 300 + i, "content": f"<|extra{i}|>"} for i in range(40)]
    (out / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="the tokenizer has 340 tokens but the model's vocabulary is 320"):
        open_subject(out)


def test_hugging_face_folder_that_does_not_fit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(write_checkpoint(tmp_path, small_model("qwen3")), out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(UserError, match=r"do not fit its config.json: model.layers.2.\S+"):
        open_subject(out)
    (out / "config.json").write_text(json.dumps({**config, "intermediate_size": SIZES["intermediate_size"] * 2}))
    with pytest.raises(UserError, match="out: "):
        open_subject(out)
    (out / "config.json").write_text(json.dumps(config))
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="transformers cannot load .*out"):
        open_subject(out)


class Runs:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_weights_that_are_pickled_are_refused_and_not_read(tmp_path: Path) -> None:
    out, trace = tmp_path / "out", tmp_path / "ran"
    export(write_checkpoint(tmp_path, small_model("qwen3")), out)
    (out / "model.safetensors").unlink()
    torch.save({"weight": Runs(trace)}, out / "pytorch_model.bin")
    with pytest.raises(UserError, match="transformers cannot load .*model.safetensors"):
        open_subject(out)
    assert not trace.exists()


def test_lora_run_is_its_merged_model(tmp_path: Path) -> None:
    export(write_checkpoint(tmp_path / "base", small_model("qwen3", seed=5)), tmp_path / "run" / "merged")
    write_checkpoint(tmp_path / "run" / "checkpoints", small_model("qwen3", seed=6))
    subject = open_subject(tmp_path / "run", dtype="fp32")
    assert subject.description["path"] == str(tmp_path / "run" / "merged")
    assert (logits(subject.model) - logits(small_model("qwen3", seed=5))).abs().max() <= 1e-5
