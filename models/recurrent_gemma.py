"""RecurrentGemma of transformers with a scan in chunks, for rows of several documents.

Griffin (De et al., https://arxiv.org/abs/2402.19427): RG-LRU behind a short convolution, beside local attention.
B rows, T positions, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import (
    RecurrentGemmaModel,
    RecurrentGemmaRecurrentBlock,
    RecurrentGemmaRglru,
)

from millrace.models.recurrence import DocumentConv1d, exactly, linear_scan


def adopt(model: nn.Module) -> None:
    """Let the recurrent blocks of a built model compute this way, in place; weights and names stay as they are."""
    for module in model.modules():
        if type(module) is RecurrentGemmaRecurrentBlock:
            module.__class__, module.rg_lru.__class__ = RecurrentBlock, Rglru
            DocumentConv1d.adopt(module.conv_1d)
        elif isinstance(module, RecurrentGemmaModel):
            # Embeddings are scaled by a number that was rounded to bf16; built at ZeRO 3 it would be another, in fp32.
            module.register_buffer("normalizer", module.normalizer.to(torch.bfloat16), persistent=False)


class Rglru(RecurrentGemmaRglru):
    """The gates are transformers', and so is the start of a document, where positions are 0; the recurrence is ours."""

    def forward(self, activations: Tensor, position_ids: Tensor) -> Any:
        """(B, T, D) → (B, T, D). Gates and states are in fp32 under autocast too: decays are near 1."""
        with exactly(activations.device):
            return super().forward(activations.to(self.recurrent_param.dtype), position_ids)

    def _rnn_scan(
        self,
        hidden_states: Tensor,
        recurrent_gate: Tensor,
        reset: Tensor,
        recurrent_states: Tensor | None,
        acc_dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Any]:
        """States (B, T, D) and, where there were some before, the last of them, fp32 (B, D)."""
        if hidden_states.shape[1] == 1:
            found: tuple[Tensor, Tensor] = super()._rnn_scan(hidden_states, recurrent_gate, reset, recurrent_states)
            return found
        decay_BTD, inputs_BTD = (recurrent_gate * ~reset).to(acc_dtype), hidden_states.to(acc_dtype)
        if recurrent_states is not None:
            first_BD = inputs_BTD[:, 0] + decay_BTD[:, 0] * recurrent_states
            inputs_BTD = torch.cat([first_BD[:, None], inputs_BTD[:, 1:]], 1)
        states_BTD = linear_scan(decay_BTD, inputs_BTD)
        # Without a cache nothing is kept: it would hold the graph of the step until the next one.
        return states_BTD.to(hidden_states.dtype), None if recurrent_states is None else states_BTD[:, -1]


class RecurrentBlock(RecurrentGemmaRecurrentBlock):
    """With a cache as in transformers; without one for rows of several documents."""

    conv1d_state: Any

    def forward(
        self,
        input_states: Tensor,
        position_ids: Tensor,
        attention_mask: Any = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(B, T, D) → (B, T, D)."""
        if use_cache:
            return super().forward(input_states, position_ids, attention_mask, use_cache, **kwargs)
        self.conv1d_state = self.rg_lru.recurrent_states = None
        inputs_BTD = self.conv_1d(self.linear_x(input_states).transpose(1, 2), position_ids).transpose(1, 2)
        states_BTD = self.rg_lru(inputs_BTD, position_ids)
        return self.linear_out(states_BTD * self.act_fn(self.linear_y(input_states))), None
