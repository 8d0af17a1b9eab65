"""A plain LSTM (Hochreiter and Schmidhuber, 1997) as a causal language model of transformers: the baseline.

It is registered as `model.kind = "lstm"` when `millrace.models.bridge` is imported; whoever loads an exported folder
imports it before. B rows, T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput


@strict
class LstmConfig(PretrainedConfig):
    """Sizes of the model."""

    model_type = "lstm"

    vocab_size: int = 50304
    hidden_size: int = 512
    num_hidden_layers: int = 2
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


class LstmPreTrainedModel(PreTrainedModel):
    """What both models share."""

    config_class = LstmConfig
    base_model_prefix = "model"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.LSTM):
            bound = self.config.hidden_size**-0.5  # torch's own
            for parameter in module.parameters(recurse=False):
                init.uniform_(parameter, -bound, bound)
        else:
            super()._init_weights(module)


class LstmModel(LstmPreTrainedModel):
    """Embedding, LSTM layers, norm."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.lstm = nn.LSTM(width, width, config.num_hidden_layers, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.post_init()

    def forward(self, input_ids: Tensor, **_unused: Any) -> BaseModelOutput:
        """Hidden states (B, T, D) of tokens (B, T); every row begins anew. Right padding changes nothing before it."""
        hidden_BTD, _ = self.lstm(self.embed_tokens(input_ids))
        return BaseModelOutput(last_hidden_state=self.norm(hidden_BTD))


class LstmForCausalLM(LstmPreTrainedModel, GenerationMixin):
    """The model with a head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        self.model = LstmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **_unused: Any) -> CausalLMOutput:
        """Logits (B, T, V) of tokens (B, T)."""
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))


AutoConfig.register("lstm", LstmConfig)
AutoModel.register(LstmConfig, LstmModel)
AutoModelForCausalLM.register(LstmConfig, LstmForCausalLM)
