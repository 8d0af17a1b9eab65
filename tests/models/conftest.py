"""Small models of every registered kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from millrace.models.architecture import architecture
from millrace.models.bridge import build_model
from millrace.models.config import ModelConfig

# Sizes of the families that the depth dial does not size.
SIZES = {
    "lstm": {"hidden_size": 64, "num_hidden_layers": 2},
    "mamba2": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1,
        "chunk_size": 16,
    },
    "recurrent_gemma": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "lru_width": 64, "attention_window_size": 64, "block_types": ("recurrent", "recurrent", "attention"),
    },
    "xlstm": {
        "hidden_size": 64, "embedding_dim": 64, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 4,
        "qk_dim_factor": 0.5, "v_dim_factor": 1.0, "chunk_size": 16,
    },
}  # fmt: skip
VOCAB, LENGTH, SEED = 500, 256, 7


def small_config(kind: str, **changes: object) -> ModelConfig:
    record = architecture(kind)
    if record is not None and record.mlp:
        return ModelConfig(**{"kind": kind, "depth": 2, **changes})
    return ModelConfig(**{"kind": kind, "config": SIZES[kind], **changes})


@pytest.fixture(scope="session")
def build() -> Callable[..., PreTrainedModel]:
    """build(kind, **fields of ModelConfig) → a two-layer model with 500 (padded to 512) tokens."""
    return lambda kind, **changes: build_model(small_config(kind, **changes), VOCAB, LENGTH, SEED)


@pytest.fixture(scope="session")
def config_of() -> Callable[..., ModelConfig]:
    return small_config


@pytest.fixture
def ids_BT() -> torch.Tensor:
    return torch.randint(1, VOCAB, (2, 64), generator=torch.Generator().manual_seed(1))
