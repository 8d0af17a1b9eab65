"""Parameters and operations against counts by hand and against a counted training step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from millrace.models import REGISTRY
from millrace.models.bridge import hf_config
from millrace.models.config import ModelConfig
from millrace.models.counts import flops_per_token, parameter_counts

V, L, T = 512, 3, 64
W = 64 * L


def qwen3_by_hand() -> tuple[int, int]:
    """(matrix weights of the layers, other weights of the layers) of `depth = 3`: 3 heads, gated inner size 512."""
    inner = 512  # 8/3 · 192
    matrices = L * (4 * W * W + 3 * W * inner)
    return matrices, L * (2 * W + 2 * 64)  # two norms over the width, two over the heads' 64


def test_qwen3_by_hand() -> None:
    config = hf_config(ModelConfig(depth=L), 500, T)
    matrices, norms = qwen3_by_hand()
    counts = parameter_counts(config)
    assert counts.total == counts.active == matrices + norms + W + 2 * V * W
    assert counts.embedding == counts.head == V * W
    assert flops_per_token(config, T) == 6 * (matrices + V * W) + 12 * L * W * T


def test_tied_head_is_counted_once_as_weights_and_still_as_work() -> None:
    free, tied = (hf_config(ModelConfig(depth=L, config={"tie_word_embeddings": t}), 500, T) for t in (False, True))
    assert parameter_counts(tied).total == parameter_counts(free).total - V * W
    assert parameter_counts(tied).head == 0 and parameter_counts(tied).embedding == V * W
    assert flops_per_token(tied, T) == flops_per_token(free, T)


def test_gpt2_by_hand() -> None:
    config = hf_config(ModelConfig(kind="gpt2", depth=L), 500, T)
    matrices = L * 12 * W * W
    biases = L * (3 * W + W + 4 * W + W)
    norms = 2 * W * (2 * L + 1)
    counts = parameter_counts(config)
    assert counts.total == matrices + biases + norms + (V + T) * W + V * W
    assert counts.embedding == (V + T) * W
    assert flops_per_token(config, T) == 6 * (matrices + V * W) + 12 * L * W * T


def test_released_gpt2_and_llama_sizes() -> None:
    """124,439,808 and 6,738,415,616 weights, the published sizes of GPT-2 small and Llama 7B."""
    gpt2 = ModelConfig(kind="gpt2", config={"vocab_size": 50257, "n_positions": 1024, "tie_word_embeddings": True})
    assert parameter_counts(hf_config(gpt2, 50257, 1024)).total == 124_439_808
    llama = ModelConfig(kind="llama", config={"vocab_size": 32000, "intermediate_size": 11008})
    assert parameter_counts(hf_config(llama, 32000, 2048)).total == 6_738_415_616


def test_mixture_counts_the_visited_experts() -> None:
    config = hf_config(ModelConfig(kind="mixtral", depth=L), 500, T)
    experts, visited, inner = 8, 2, 256
    expert = 3 * W * inner
    attention, router = 4 * W * W, experts * W
    counts = parameter_counts(config)
    rest = 2 * V * W + W + L * (2 * W + attention + router)
    assert counts.total == rest + L * experts * expert
    assert counts.active == rest + L * visited * expert
    assert flops_per_token(config, T) == 6 * (V * W + L * (attention + router + visited * expert)) + 12 * L * W * T


# A real LSTM is one operator, of which torch does not know how much it computes; see test_lstm.py.
@pytest.mark.parametrize("kind", sorted(set(REGISTRY) - {"mixtral", "qwen3_moe", "lstm"}))
def test_a_real_training_step_counts_the_same(kind: str, build: Callable, config_of: Callable) -> None:
    """Forward and backward of a model with weights; the backward pass is twice the forward pass."""
    model = build(kind, **({} if kind in ("mamba2", "xlstm") else {"attention": "eager"}))
    config = hf_config(config_of(kind), 500, 256)
    ids = torch.randint(0, 500, (1, T), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        forward = model(input_ids=ids, use_cache=False)
    assert 3 * counter.get_total_flops() / T == flops_per_token(config, T)
    if kind in ("mamba2", "recurrent_gemma"):
        return  # torch's counter takes the backward pass of their grouped convolutions for ungrouped ones
    with FlopCounterMode(display=False) as counter:
        forward.logits.sum().backward()
    assert 3 * counter.get_total_flops() / (2 * T) == pytest.approx(flops_per_token(config, T), rel=0.005)


@pytest.mark.parametrize("kind", sorted(REGISTRY))
def test_total_is_that_of_the_model(kind: str, build: Callable, config_of: Callable) -> None:
    counted = parameter_counts(hf_config(config_of(kind), 500, 256)).total
    assert counted == sum(p.numel() for p in build(kind).parameters())
