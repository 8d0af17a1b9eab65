"""Writing token after token with a cache, in batches, within a set of ids, guided away from what has no prompt.

B rows, T positions, V vocabulary, A ids that are allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from millrace.core.errors import UserError
from millrace.models.heads import backbone_and_head, logits_transform


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    guidance: float = 0.0  # how much further away from what has no prompt; 0: none
    temperature: float = 1.0  # 0 takes the likeliest
    top_k: int = 0  # of so many likeliest; 0: of all
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.guidance, self.temperature, self.top_k) < 0:
            raise UserError(
                f"guidance {self.guidance}, temperature {self.temperature} and top-k {self.top_k} must be 0 or more"
            )


@dataclass(frozen=True)
class Wanted:
    """Which ids may be written, which of them end a row, and how many are written at most, that one included."""

    allowed: Sequence[int]
    ends: frozenset[int]
    most: int


@torch.no_grad()
def decode(
    model: Any, prompts: Sequence[np.ndarray], null: np.ndarray, wanted: Wanted, how: Sampling
) -> list[list[int]]:
    """What follows each prompt, without what ended it.

    With guidance, `null` is the prompt that says nothing, and logits are null + (1 + guidance) · (given - null), which
    is the rule of Ho and Salimans (https://arxiv.org/abs/2207.12598, equation 6) for logits. Row number n is drawn
    from (seed, n) alone, so that a row is the same in any batch (up to rounding). A model that is partitioned under
    ZeRO 3 is called on every rank alike.
    """
    guided, rows = how.guidance > 0, len(prompts)
    writer = _Writer(model, [*prompts, *([null] * rows if guided else [])])
    draws = np.stack([np.random.default_rng([how.seed, row]).random(wanted.most) for row in range(rows)])
    allowed = torch.tensor(list(wanted.allowed), device=writer.device)
    written: list[list[int]] = [[] for _ in range(rows)]
    running = [True] * rows
    for step in range(wanted.most):
        logits_BA = writer.logits()[:, allowed].float()
        if guided:
            given, without = logits_BA.chunk(2)
            logits_BA = without + (1 + how.guidance) * (given - without)
        chosen = allowed[draw(logits_BA, draws[:, step], how)]
        for row, token in enumerate(chosen.tolist()):
            running[row] = running[row] and token not in wanted.ends
            if running[row]:
                written[row].append(token)
        if not any(running) or step == wanted.most - 1:
            break
        writer.write(chosen.repeat(2) if guided else chosen)
    return written


def draw(logits_BA: Tensor, uniform_B: np.ndarray, how: Sampling) -> Tensor:
    """Places (B,) in the allowed ids: where the running sum of their probabilities passes numbers from [0, 1)."""
    if how.temperature == 0:
        return logits_BA.argmax(1)
    logits_BA = logits_BA.double() / how.temperature
    if 0 < how.top_k < logits_BA.shape[1]:
        least = logits_BA.topk(how.top_k).values[:, -1:]
        logits_BA = logits_BA.masked_fill(logits_BA < least, -torch.inf)
    passed = logits_BA.softmax(1).cumsum(1)
    target = torch.from_numpy(uniform_B).to(passed.device)[:, None] * passed[:, -1:]
    return torch.searchsorted(passed, target, right=True).squeeze(1).clamp(max=passed.shape[1] - 1)


class _Writer:
    """A batch of rows, filled up at their left, and the cache of what was read."""

    def __init__(self, model: Any, prompts: Sequence[np.ndarray]) -> None:
        self._backbone, self._head = backbone_and_head(model)
        self._transform = logits_transform(model.config)
        self.device = model.get_input_embeddings().weight.device
        length = max(map(len, prompts))
        ids = np.stack([np.pad(prompt, (length - len(prompt), 0)) for prompt in prompts])
        there = np.stack([np.arange(length) >= length - len(prompt) for prompt in prompts])
        self._next = torch.from_numpy(ids).long().to(self.device)
        self._mask = torch.from_numpy(there).to(self.device)
        self._positions = (self._mask.long().cumsum(1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=model.config)

    def logits(self) -> Tensor:
        """Of the token behind what was read (B, V)."""
        found: Any = self._backbone(
            input_ids=self._next, attention_mask=self._mask.long(), position_ids=self._positions,
            past_key_values=self._cache, use_cache=True,
        )  # fmt: skip
        logits: Tensor = self._transform(self._head(found.last_hidden_state[:, -1:]))
        return logits[:, 0]

    def write(self, tokens: Tensor) -> None:
        """Take the next token (B,) of every row."""
        self._next = tokens[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self._positions = self._positions[:, -1:] + 1
