"""A plain LSTM (Hochreiter and Schmidhuber, 1997) as a causal language model of transformers: the baseline.

It is registered as `model.kind = "lstm"` when `millrace.models.bridge` is imported; whoever loads an exported folder
imports it before. B rows, T positions, D hidden, L layers, V vocabulary.
"""

from __future__ import annotations

import itertools
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


class DocumentLSTM(nn.LSTM):
    """Layers whose states begin anew with every document.

    Rows are run from one border of any of them to the next: as much work as rows without borders. A packed sequence of
    the documents takes five times as long, for its backward pass goes over all of it in every step; a document in each
    row computes on padding. The loop lies inside the module, because at ZeRO 3 weights are gathered whenever it is
    called, on all ranks together, and ranks have different borders.
    """

    def forward(self, inputs_BTD: Tensor, starts_B11T: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """States (B, T, D); `starts_B11T` is a table of `millrace.models.attention.document_starts`."""
        if starts_B11T is None:
            found: Tensor = super().forward(inputs_BTD)[0]
            return found
        batch, length, width = inputs_BTD.shape
        begins_BT = starts_B11T[:, 0, 0] == torch.arange(length, device=inputs_BTD.device)
        borders = begins_BT[:, 1:].any(0).nonzero().flatten() + 1
        state = (inputs_BTD.new_zeros(self.num_layers, batch, width),) * 2
        parts = []
        for start, end in itertools.pairwise([0, *borders.tolist(), length]):
            goes_on_B1 = ~begins_BT[:, start, None]
            before = state[0] * goes_on_B1, state[1] * goes_on_B1
            part_BTD, state = super().forward(inputs_BTD[:, start:end], before)
            parts.append(part_BTD)
        return torch.cat(parts, 1)


class LstmPreTrainedModel(PreTrainedModel):
    """What both models share."""

    _supports_attention_backend = True  # it has none: this is the name of the table of documents
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
        self.lstm = DocumentLSTM(width, width, config.num_hidden_layers, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_unused: Any) -> BaseModelOutput:
        """Hidden states (B, T, D) of tokens (B, T); every row begins anew, and every document of a table of starts.

        Right padding changes nothing before it.
        """
        table = attention_mask is not None and attention_mask.dtype == torch.int32
        hidden_BTD = self.lstm(self.embed_tokens(input_ids), attention_mask if table else None)
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
