"""Sizes of buckets, and the blocks that ZeRO 3 gathers whole."""

import pytest
import torch
from deepspeed.utils import z3_leaf_module
from transformers import AutoConfig, AutoModelForCausalLM

from millrace.engine.config import EngineConfig
from millrace.engine.zero import bucket_elements, deepspeed_config, fit_buckets, gather_by_block


@pytest.mark.parametrize(
    ("parameters", "elements"), [(10_000, 1_000_000), (160_000_000, 40_000_000), (70_000_000_000, 500_000_000)]
)
def test_buckets_are_a_quarter_of_the_model_between_bounds(parameters, elements):
    assert bucket_elements(parameters) == elements


def test_a_users_own_buckets_stay():
    settings = deepspeed_config(EngineConfig(), "fp32", micro_batch=1, accumulation=1, clip=1.0)
    settings["zero_optimization"]["reduce_bucket_size"] = 7
    fit_buckets(settings, 160_000_000)
    zero = settings["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (7, 40_000_000)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "mixtral"])
def test_blocks_are_gathered_whole_unless_weights_are_frozen(kind):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, num_hidden_layers=2))
    (blocks,) = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
    next(model.parameters()).requires_grad_(False)
    gather_by_block(model)
    assert not any(map(z3_leaf_module, model.modules()))
    model.requires_grad_(True)
    gather_by_block(model)
    assert [m for m in model.modules() if z3_leaf_module(m)] == list(blocks)
