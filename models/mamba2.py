"""Mamba-2 of transformers (Dao and Gu, https://arxiv.org/abs/2405.21060) for rows of several documents.

B rows, T positions, D channels, H heads, P width of a head, G groups of heads, N size of a state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from millrace.models.recurrence import DocumentConv1d, documents, exactly, state_space_scan

_CPU_CHUNK = 64  # larger ones are slower there; what is computed does not depend on it


def adopt(model: nn.Module) -> None:
    """Let the mixers of a built model compute this way, in place; weights and names stay as they are."""
    for module in model.modules():
        if type(module) is Mamba2Mixer:
            module.__class__ = Mixer
            DocumentConv1d.adopt(module.conv1d)


class Mixer(Mamba2Mixer):
    """With a cache or a mask of padding as in transformers; without them for rows of several documents."""

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """(B, T, D) → (B, T, D); `position_ids` among `kwargs` restart at 0 in every document."""
        if cache_params is not None or attention_mask is not None:
            return super().forward(hidden_states, cache_params, attention_mask, **kwargs)
        batch, length, _ = hidden_states.shape
        positions_BT = kwargs.get("position_ids")
        if positions_BT is None:
            positions_BT = torch.arange(length, device=hidden_states.device)[None]
        gate_BTD, mixed_BTD, raw_BTH = self.in_proj(hidden_states).split(
            [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1
        )
        mixed_BTD = self.act(self.conv1d(mixed_BTD.transpose(1, 2), positions_BT)).transpose(1, 2)
        states = self.n_groups * self.ssm_state_size
        inputs, into, out = mixed_BTD.split([self.intermediate_size, states, states], dim=-1)
        found_BTHP = self._scan((inputs, into, out), raw_BTH, positions_BT)
        found_BTD = self.norm(found_BTHP.reshape(batch, length, -1), gate_BTD)
        return self.out_proj(found_BTD.to(hidden_states.dtype))

    def _scan(self, mixed: tuple[Tensor, Tensor, Tensor], raw_BTH: Tensor, positions_BT: Tensor) -> Tensor:
        """What stands in the states, (B, T, H, P), in fp32 whatever the weights and autocast are."""
        with exactly(raw_BTH.device):
            batch, length, heads = raw_BTH.shape
            inputs_BTHP, into_BTGN, out_BTGN = (
                each.float().reshape(batch, length, count, -1)
                for each, count in zip(mixed, (heads, self.n_groups, self.n_groups), strict=True)
            )
            step_BTH = F.softplus(raw_BTH.float() + self.dt_bias.float()).clamp(*self.time_step_limit)
            log_decay_BTH = -self.A_log.float().exp() * step_BTH
            chunk = min(self.chunk_size, _CPU_CHUNK) if raw_BTH.device.type == "cpu" else self.chunk_size
            moved_BTHP, document_BT = inputs_BTHP * step_BTH[..., None], documents(positions_BT)
            found_BTHP = state_space_scan(moved_BTHP, log_decay_BTH, into_BTGN, out_BTGN, document_BT, chunk)
            return found_BTHP + self.D.float()[:, None] * inputs_BTHP
