"""What a model is told beside its input. B rows, T tokens, E width."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Words(nn.Module):
    """The mean of the tokens' embeddings."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, E), of the tokens where the mask is true; 0 where there are none."""
        weights = mask_BT[:, :, None].to(self.table.weight.dtype)
        return (self.table(tokens_BT) * weights).sum(1) / weights.sum(1).clamp(min=1)


def seen_tokens(tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Which tokens are there, bool (B, T)."""
    return torch.arange(tokens_BT.shape[1], device=lengths_B.device) < lengths_B[:, None]
