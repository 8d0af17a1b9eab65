"""The LSTM: against torch's own, padding, and a folder that loads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from millrace.core.errors import UserError
from millrace.models.bridge import build_model
from millrace.models.config import ModelConfig
from millrace.models.counts import flops_per_token


def small() -> Any:
    return build_model(ModelConfig(kind="lstm", config={"hidden_size": 32}), 300, 64, 0).eval()


@torch.no_grad()
def test_logits_are_those_of_torch() -> None:
    model, ids = small(), torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    weights = model.state_dict()
    reference = nn.LSTM(32, 32, 2, batch_first=True)
    reference.load_state_dict({n.removeprefix("model.lstm."): w for n, w in weights.items() if ".lstm." in n})
    hidden, _ = reference(nn.functional.embedding(ids, weights["model.embed_tokens.weight"]))
    hidden = nn.functional.layer_norm(hidden, (32,), weights["model.norm.weight"], weights["model.norm.bias"])
    torch.testing.assert_close(model(ids).logits, hidden @ weights["lm_head.weight"].T)


@torch.no_grad()
def test_padding_on_the_right_changes_nothing_before_it() -> None:
    model, ids = small(), torch.randint(0, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    torch.testing.assert_close(model(padded).logits[:, :9], model(ids).logits)


@torch.no_grad()
def test_loads_again_and_continues(tmp_path: Path) -> None:
    model, ids = small(), torch.randint(0, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    continued = again.generate(ids, max_new_tokens=3, do_sample=False)
    for number in range(9, 12):
        assert continued[0, number] == model(continued[:, :number]).logits[0, -1].argmax()


def test_operations_by_hand() -> None:
    config, width = small().config, 32
    assert flops_per_token(config, 64) == 6 * (2 * 8 * width**2 + config.vocab_size * width)


def test_an_attention_that_would_hide_the_documents_is_refused() -> None:
    with pytest.raises(UserError, match="model.attention = 'sdpa' computes kind 'lstm' wrongly"):
        build_model(ModelConfig(kind="lstm", attention="sdpa", config={"hidden_size": 32}), 300, 64, 0)
