"""From `[model]` to a transformers configuration, and the messages for what does not fit."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from millrace.core.config import build as build_config
from millrace.core.config import load_config, to_dict
from millrace.core.errors import UserError
from millrace.models import REGISTRY
from millrace.models.architecture import architecture
from millrace.models.bridge import build_model, hf_config
from millrace.models.config import ModelConfig


def made(vocab_size: int = 500, length: int = 256, **fields: object) -> object:
    return hf_config(ModelConfig(**fields), vocab_size, length)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "qwen33"}, "'qwen33' is no architecture.*did you mean 'qwen3'"),
        ({"kind": "vit"}, "'vit' is no causal language model"),
        ({"kind": "qwen3"}, "has no size; set model.depth"),
        ({"depth": 2, "config": {"hiden_size": 64}}, "model.config.hiden_size.*did you mean 'hidden_size'"),
        ({"kind": "gpt2", "depth": 2, "config": {"n_embed": 64}}, "model.config.n_embed.*did you mean 'n_embd'"),
        ({"depth": 2, "config": {"hidden_size": "big"}}, "model.config.hidden_size = 'big'"),
        ({"depth": 2, "config": {"rms_norm_eps": "big"}}, r"transformers refuses.*rms_norm_eps.*model.config"),
        ({"depth": 2, "config": {"vocab_size": 100}}, "tokenizer has 500 tokens but.*vocab_size is 100"),
        ({"depth": 2, "config": {"max_position_embeddings": 8}}, "sequence length is 256 but.* is 8"),
        ({"kind": "mamba2", "depth": 2}, "model.depth = 2 cannot size 'mamba2'.*qwen3"),
        ({"depth": 2, "attention": "flash"}, "model.attention = 'flash' is unknown"),
        ({"kind": "gemma2", "depth": 2, "attention": "sdpa"}, "computes kind 'gemma2' wrongly"),
        ({"kind": "gemma2", "depth": 2, "attention": "documents"}, "not proven for kind 'gemma2'"),
        ({"init": "/nowhere/at/all"}, "model.init = '/nowhere/at/all'"),
    ],
)
def test_mistakes_are_named(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        made(**fields)


def test_local_checks_name_the_key() -> None:
    with pytest.raises(UserError, match="model.depth = 0"):
        build_config(ModelConfig, {"depth": 0})
    with pytest.raises(UserError, match="model.depth = 4 with model.init = 'x'"):
        build_config(ModelConfig, {"depth": 4, "init": "x"})


def test_section_survives_its_dictionary() -> None:
    config = load_config(ModelConfig, None, ["kind=gpt2", "depth=3", "config={resid_pdrop=0.1}"])
    assert config == ModelConfig(kind="gpt2", depth=3, config={"resid_pdrop": 0.1})
    assert build_config(ModelConfig, to_dict(config)) == config


def test_dial_follows_nanochats_rule() -> None:
    made_of = made(kind="nanochat", depth=6)
    assert (made_of.num_hidden_layers, made_of.hidden_size, made_of.intermediate_size) == (6, 384, 4 * 384)
    assert (made_of.num_attention_heads, made_of.num_key_value_heads) == (6, 6)
    gated = made(kind="qwen3", depth=6)
    assert (gated.hidden_size, gated.head_dim, gated.intermediate_size) == (384, 64, 1024)
    plain = made(kind="gpt2", depth=6)
    assert (plain.n_embd, plain.n_layer, plain.n_head, plain.n_inner) == (384, 6, 6, None)
    mixture = made(kind="qwen3_moe", depth=6)
    assert (mixture.num_experts, mixture.num_experts_per_tok, mixture.moe_intermediate_size) == (8, 2, 512)
    assert not gated.tie_word_embeddings and not plain.tie_word_embeddings


def test_given_keys_win_over_the_dial() -> None:
    both = made(kind="gpt2", depth=4, config={"hidden_size": 128, "n_head": 4, "tie_word_embeddings": True})
    assert (both.n_embd, both.n_layer, both.n_head, both.tie_word_embeddings) == (128, 4, 4, True)
    assert made(kind="qwen3_moe", depth=2, config={"num_experts": 4}).num_experts == 4
    narrow = made(depth=4, config={"hidden_size": 128})
    assert (narrow.num_attention_heads, narrow.head_dim, narrow.intermediate_size) == (2, 64, 384)


@pytest.mark.parametrize("kind", sorted(k for k in REGISTRY if architecture(k).mlp))
def test_what_is_left_out_is_made_for_pretraining(kind: str) -> None:
    config = made(kind=kind, depth=2)
    assert config.vocab_size == 512 and config.max_position_embeddings == 256 and config.use_cache is False
    assert config.pad_token_id is None and config.eos_token_id is None
    rates = {k: v for k, v in config.to_dict().items() if "pdrop" in k or k.endswith("dropout")}
    assert set(rates.values()) <= {0.0}, rates
    assert "vocab_size" not in ModelConfig(kind=kind, depth=2).config


def test_given_vocabulary_is_not_padded() -> None:
    assert made(depth=2, config={"vocab_size": 500}).vocab_size == 500
    assert AutoConfig.for_model("mistral").attention_dropout == made(kind="mistral", depth=2).attention_dropout == 0


def test_attention_is_chosen_by_family() -> None:
    assert made(depth=2)._attn_implementation == "documents"
    assert made(depth=2, attention="sdpa")._attn_implementation == "sdpa"
    assert made(kind="gemma2", depth=2)._attn_implementation == "eager"
    sizes = {"hidden_size": 64, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert made(kind="opt", config={**sizes, "word_embed_proj_dim": 64})._attn_implementation == "sdpa"


def test_global_stage_3_of_accelerate_does_not_partition_by_itself() -> None:
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

    held = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        model = build_model(ModelConfig(depth=1), 500, 64, 0)
        assert is_deepspeed_zero3_enabled()
        assert all(p.numel() > 0 for p in model.parameters()) and model.training
    finally:
        unset_hf_deepspeed_config()
        del held
    assert torch.isfinite(model.lm_head.weight).all()
