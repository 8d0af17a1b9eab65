"""Starting from a Hugging Face folder: equal logits, and refusals by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from millrace.core.errors import UserError
from millrace.models.bridge import build_model
from millrace.models.config import ModelConfig

FILE = "model.safetensors"


@pytest.fixture
def folder(build: Callable, tmp_path: Path) -> Path:
    build("qwen3").save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("gpt2", {"tie_word_embeddings": True}),
        ("mixtral", {}),
        ("qwen3_moe", {}),
        ("gemma2", {}),
        ("phi3", {}),
    ],
)
def test_logits_equal_those_of_from_pretrained(
    kind: str, table: dict, build: Callable, ids_BT: torch.Tensor, tmp_path: Path
) -> None:
    saved = build(kind, config=table)
    for parameter in saved.parameters():  # norms start at one; make every tensor count
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    saved.save_pretrained(tmp_path, max_shard_size="1MB")
    ours = build_model(ModelConfig(kind="llama", init=str(tmp_path)), 500, 256, 0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert type(ours) is type(theirs) and (tmp_path / "model.safetensors.index.json").exists()
    left, right = (m(input_ids=ids_BT, use_cache=False).logits for m in (ours, theirs))
    torch.testing.assert_close(left, right, atol=1e-5, rtol=0)
    assert (right - build(kind, config=table)(input_ids=ids_BT, use_cache=False).logits).abs().max() > 1e-2


def test_half_precision_file_is_read_into_fp32(build: Callable, tmp_path: Path) -> None:
    saved = build("qwen3").bfloat16()
    saved.save_pretrained(tmp_path)
    ours = build_model(ModelConfig(init=str(tmp_path)), 500, 256, 0)
    assert ours.lm_head.weight.dtype == torch.float32
    assert torch.equal(ours.lm_head.weight, saved.lm_head.weight.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing tensors: model.norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "missing tensors: lm_head.weight"),
        (lambda t: t.update(extra=torch.ones(2)), "unexpected tensors: extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"mis-shaped tensors: model.norm.weight is \[3\], expected \[128\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, change: Callable, message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(UserError, match=message):
        build_model(ModelConfig(init=str(folder)), 500, 256, 0)


def test_torn_and_missing_files_are_named(folder: Path) -> None:
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{FILE} is torn"):
        build_model(ModelConfig(init=str(folder)), 500, 256, 0)
    (folder / FILE).unlink()
    with pytest.raises(UserError, match=f"has no {FILE}"):
        build_model(ModelConfig(init=str(folder)), 500, 256, 0)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        build_model(ModelConfig(init=str(folder)), 500, 256, 0)


def test_tokenizer_and_sequences_must_fit_the_folder(folder: Path) -> None:
    with pytest.raises(UserError, match=r"600 tokens but the model's vocab_size is 512 \(in .*config.json"):
        build_model(ModelConfig(init=str(folder)), 600, 256, 0)
    with pytest.raises(UserError, match="sequence length is 512 but the model's max_position_embeddings is 256"):
        build_model(ModelConfig(init=str(folder)), 500, 512, 0)
    longer = ModelConfig(init=str(folder), config={"max_position_embeddings": 512})
    assert build_model(longer, 500, 512, 0).config.max_position_embeddings == 512
