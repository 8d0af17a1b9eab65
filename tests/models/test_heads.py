"""transform(head(backbone(x))) is model(x).logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from millrace.core.errors import UserError
from millrace.models import REGISTRY
from millrace.models.architecture import architecture
from millrace.models.bridge import build_model
from millrace.models.config import ModelConfig
from millrace.models.heads import LogitsTransform, backbone_and_head, logits_transform

BASE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
UNREGISTERED = {
    "gemma3_text": {**BASE, "num_key_value_heads": 2, "head_dim": 32, "final_logit_softcapping": 5.0},
    "granitemoe": {**BASE, "num_key_value_heads": 2, "num_local_experts": 4, "logits_scaling": 3.0},
    "olmoe": {**BASE, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {**{k: v for k, v in BASE.items() if k != "intermediate_size"}, "ffn_dim": 64, "word_embed_proj_dim": 64},
    "phi": {**BASE, "num_key_value_heads": 2},
}


def check(model: nn.Module, ids_BT: torch.Tensor) -> None:
    # Large weights, so that a missing cap or factor shows.
    head = model.get_output_embeddings()
    head.weight.data = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(3))
    backbone, head = backbone_and_head(model)
    hidden = backbone(input_ids=ids_BT, use_cache=False).last_hidden_state
    logits = logits_transform(model.config)(head(hidden))
    expected = model(input_ids=ids_BT, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("kind", sorted(kind for kind in REGISTRY if not architecture(kind).masked))
def test_registered_kinds(kind: str, build: Callable, ids_BT: torch.Tensor) -> None:
    check(build(kind), ids_BT)


@pytest.mark.parametrize("kind", sorted(UNREGISTERED))
def test_other_kinds_pass_the_check_by_operations(kind: str, ids_BT: torch.Tensor) -> None:
    check(build_model(ModelConfig(kind=kind, config=UNREGISTERED[kind]), 500, 256, 0), ids_BT)


@pytest.mark.parametrize(("kind", "table"), [("granite", {"logits_scaling": 4.0}), ("cohere", {"logit_scale": 0.25})])
def test_factors_that_are_not_one(kind: str, table: dict, build: Callable, ids_BT: torch.Tensor) -> None:
    model = build(kind, config=table)
    check(model, ids_BT)
    assert logits_transform(model.config) == LogitsTransform(factor=0.25)


def test_caps_are_found(build: Callable) -> None:
    caps = {kind: logits_transform(build(kind).config).cap for kind in ("nanochat", "gemma2", "xlstm", "qwen3")}
    assert caps == {"nanochat": 15.0, "gemma2": 30.0, "xlstm": 30.0, "qwen3": 0.0}


@pytest.mark.parametrize(("kind", "extra"), [("minicpm3", {}), ("hyperclovax", {"logits_scaling": 2.0})])
def test_unknown_steps_before_the_logits_are_refused_by_name(kind: str, extra: dict) -> None:
    table = {**BASE, "num_key_value_heads": 2, **extra}
    with pytest.raises(UserError, match=f"model.kind = '{kind}' computes its logits in a way that is not supported"):
        backbone_and_head(build_model(ModelConfig(kind=kind, config=table), 500, 64, 0))


def test_same_bare_operations_with_another_head_differ(build: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check by operations sees a factor of which the configuration says nothing."""
    from transformers import OPTForCausalLM

    whole = OPTForCausalLM.forward

    def scaled(self: OPTForCausalLM, **inputs: object) -> object:
        out = whole(self, **inputs)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(OPTForCausalLM, "forward", scaled)
    with pytest.raises(UserError, match="'opt' computes its logits"):
        backbone_and_head(build_model(ModelConfig(kind="opt", config=UNREGISTERED["opt"]), 500, 64, 0))
