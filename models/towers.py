"""Encoders of transformers for one modality each, with a projection into a space that they share.

B samples, T positions, D hidden, W width of the shared space.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from millrace.core.errors import UserError, did_you_mean
from millrace.models.bridge import VOCABULARY_MULTIPLE, checked, construct, without_dropout
from millrace.models.config import TowerConfig
from millrace.models.initial import module_seed
from millrace.models.sound import LogMel
from millrace.models.vision import bare_encoder, mean_state, pictures, width_of


def build_encoder(config: TowerConfig, vocab_size: int, seed: int, zero3: dict[str, Any] | None) -> PreTrainedModel:
    """The encoder with its first weights, drawn as `bridge.build_model` says.

    Raises:
        UserError: an architecture or keys that transformers does not know.
    """
    if config.kind not in CONFIG_MAPPING:
        hint = did_you_mean(config.kind, list(CONFIG_MAPPING))
        raise UserError(f"'{config.kind}' is no architecture of the installed transformers{hint}")
    cls: Any = CONFIG_MAPPING[config.kind]
    defaults: dict[str, Any] = without_dropout(cls)
    if config.modality == "text":
        defaults["vocab_size"] = -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        defaults |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if config.modality == "audio":
        defaults["num_channels"] = 1
    built = checked(lambda: AutoConfig.for_model(config.kind, **defaults | config.config))
    return construct(lambda: bare_encoder(built), seed, zero3)


class Tower(nn.Module):
    """Encoder, mean over positions, projection, length 1."""

    def __init__(self, config: TowerConfig, encoder: PreTrainedModel, width: int, seed: int) -> None:
        super().__init__()
        self.modality, self.encoder = config.modality, encoder
        self.mel = LogMel(config.mel) if config.modality == "audio" else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(module_seed(seed, f"{config.name} projection"))
            self.projection = nn.Linear(width_of(encoder.config), width, bias=False)

    def inputs(self, values: Any, lengths: Tensor | None, device: torch.device) -> dict[str, Tensor]:
        """The arguments of `forward` from what a batch holds."""
        found = {"values": values.to(device, non_blocking=True)}
        if self.modality == "text":
            assert lengths is not None
            mask = torch.arange(values.shape[1]) < lengths[:, None]
            mask[:, 0] = True  # a sample without any word has a mean, too
            found["mask"] = mask.to(device, non_blocking=True)
        return found

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, T), images uint8 (B, height, width, 3) or sounds (B, frames) as float32 (B, W) of length 1."""
        return F.normalize(self.projected(values, mask), dim=-1)

    def projected(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `forward`, but of any length."""
        if self.modality == "text":
            assert mask is not None
            states_BTD = self.encoder(input_ids=values, attention_mask=mask).last_hidden_state
            weights = mask[:, :, None].to(states_BTD.dtype)
            mean_BD = (states_BTD * weights).sum(1) / weights.sum(1)
        else:
            mean_BD = mean_state(self.encoder, self._picture(values))
        return self.projection(mean_BD).float()

    def _picture(self, values: Tensor) -> Tensor:
        dtype = self.projection.weight.dtype
        if self.mel is not None:
            return (self.mel(values)[:, None] / 2 + 1).to(dtype)
        return pictures(values, dtype)


class Classifier(Tower):
    """Encoder, mean over positions, and a linear head: W is the number of classes."""

    def forward(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """What `Tower.forward` is given as logits, float32 (B, W)."""
        return self.projected(values, mask)
