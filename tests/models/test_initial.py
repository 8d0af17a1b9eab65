"""Initial weights: a function of the seed and the module's name, with each family's own distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3PreTrainedModel

from millrace.core.errors import UserError
from millrace.models import REGISTRY
from millrace.models.bridge import build_model, hf_config
from millrace.models.config import ModelConfig
from millrace.models.initial import module_seed


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("kind", sorted(REGISTRY))
def test_same_seed_same_weights_and_all_are_drawn(kind: str, build: Callable) -> None:
    first, second = weights(build(kind)), weights(build(kind))
    assert equal(first, second)
    assert all(torch.isfinite(w).all() for w in first.values())


@pytest.mark.parametrize("kind", sorted(REGISTRY))
def test_distribution_is_the_familys_own(kind: str, build: Callable, config_of: Callable) -> None:
    """Against transformers' own initialisation: means and standard deviations within sampling error."""
    ours = weights(build(kind))
    torch.manual_seed(0)
    theirs = weights(AutoModelForCausalLM.from_config(hf_config(config_of(kind), 500, 256)))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor.numel() < 500:
            continue
        std, allowed = tensor.std().item(), 5 / math.sqrt(2 * tensor.numel())
        assert ours[name].std().item() == pytest.approx(std, rel=2 * allowed, abs=1e-9), name
        assert ours[name].mean().item() == pytest.approx(tensor.mean().item(), abs=10 * std / math.sqrt(tensor.numel()))


def test_seeds_and_modules_differ(build: Callable) -> None:
    config = ModelConfig(depth=2)
    one, two = (weights(build_model(config, 500, 256, seed)) for seed in (1, 2))
    name = "model.layers.{}.mlp.up_proj.weight"
    assert not torch.equal(one[name.format(0)], two[name.format(0)])
    assert not torch.equal(one[name.format(0)], one[name.format(1)])
    assert module_seed(1, "a") != module_seed(1, "b") and 0 <= module_seed(1, "a") < 2**63


def test_a_modules_weights_do_not_depend_on_the_others() -> None:
    shallow, deep = (weights(build_model(ModelConfig(depth=d, config={"hidden_size": 64}), 500, 64, 3)) for d in (1, 3))
    assert all(torch.equal(shallow[name], deep[name]) for name in shallow)


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model(ModelConfig(depth=1), 500, 64, 0)
    assert torch.equal(torch.rand(3), expected) and not torch.are_deterministic_algorithms_enabled()


def test_tied_weight_is_drawn_once() -> None:
    tied, free = (
        build_model(ModelConfig(depth=1, config={"tie_word_embeddings": tie}), 500, 64, 0) for tie in (True, False)
    )
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert torch.equal(tied.lm_head.weight, free.model.embed_tokens.weight)
    assert not torch.equal(tied.lm_head.weight, free.lm_head.weight)


def test_residual_projections_keep_their_smaller_scale() -> None:
    layers = 8
    model = build_model(ModelConfig(kind="gpt2", depth=layers, config={"hidden_size": 128}), 500, 64, 0)
    for block in model.transformer.h:
        assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * layers), rel=0.05)
        assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_forgotten_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Qwen3PreTrainedModel._init_weights

    def forgetful(self: Qwen3PreTrainedModel, module: torch.nn.Module) -> None:
        if not isinstance(module, torch.nn.Embedding):
            whole(self, module)

    monkeypatch.setattr(Qwen3PreTrainedModel, "_init_weights", forgetful)
    with pytest.raises(UserError, match="leaves 'model.embed_tokens.weight' uninitialised"):
        build_model(ModelConfig(depth=1), 500, 64, 0)


def test_rotary_frequencies_are_right() -> None:
    model = build_model(ModelConfig(depth=1), 500, 64, 0)
    rope = Qwen3Config().rope_parameters["rope_theta"]
    expected = 1 / rope ** (torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
