"""Masked language modelling: BERT (Devlin et al., https://arxiv.org/abs/1810.04805, section 3.1).

B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from millrace.data.batch import IGNORED, MicroBatch
from millrace.data.tokenizer import Tokenizer
from millrace.models.bridge import MASKED, build_model, hf_config
from millrace.models.packing import PACKABLE_MASKED, check_packable
from millrace.pretrain.objectives.base import OneModule, Setting, model_files

MASK = {"mask_token": "<|mask|>"}


class MaskedLM(OneModule):
    """Guess the tokens that were hidden, from both sides."""

    of_text = False
    tokenizer: Tokenizer

    def __init__(self, model: Any, setting: Setting) -> None:
        super().__init__(MaskedLMModule(model))
        self.name, self._model, self._section = setting.model.kind, model, setting.objective
        self.tokenizer = setting.tokenizer.extended(MASK)

    @classmethod
    def check(cls, setting: Setting) -> None:
        vocabulary = setting.tokenizer.extended(MASK).vocab_size
        kind = hf_config(setting.model, vocabulary, setting.sequence_length, MASKED).model_type
        if setting.rows == "packed":
            check_packable(kind, PACKABLE_MASKED)

    @classmethod
    def build(cls, setting: Setting) -> MaskedLM:
        vocabulary = setting.tokenizer.extended(MASK).vocab_size
        length, seed = setting.sequence_length, setting.seed
        return cls(build_model(setting.model, vocabulary, length, seed, setting.zero3, MASKED), setting)

    def view(self, micro: MicroBatch) -> MicroBatch:
        """The rows with tokens hidden; labels at those positions are what was there, IGNORED elsewhere."""
        inputs, labels = micro.input_ids_BT.clone(), torch.full_like(micro.labels_BT, IGNORED)
        for row, (seed, lengths) in enumerate(zip(micro.seeds, micro.seq_lens, strict=True)):
            used = sum(lengths)
            real = torch.ones(used, dtype=torch.bool)
            real[micro.position_ids_BT[row, :used] == 0] = False  # what every document begins with is no word
            hide(inputs[row, :used], labels[row, :used], real, self._choice(int(seed)))
        return dataclasses.replace(micro, input_ids_BT=inputs, labels_BT=labels)

    def _choice(self, seed: int) -> Choice:
        tokenizer = self.tokenizer
        return Choice(np.random.default_rng(seed), self._section.share, tokenizer.special("mask_token"),
                      tokenizer.vocab_size - 1)  # fmt: skip

    def files(self) -> dict[str, str]:
        return model_files(self._model)


@dataclasses.dataclass(frozen=True)
class Choice:
    """How tokens are hidden: a share of them; 80% become `mask`, 10% any of [0, vocabulary), 10% stay."""

    random: np.random.Generator
    share: float
    mask: int
    vocabulary: int


def hide(inputs_N: Tensor, labels_N: Tensor, real_N: Tensor, how: Choice) -> None:
    """Hide tokens of one row in place, one at least, and set their labels; only those that are `real` can be."""
    places = real_N.nonzero().flatten().numpy()
    count = min(len(places), max(1, round(how.share * len(places))))
    chosen = how.random.permutation(places)[:count]
    labels_N[chosen] = inputs_N[chosen]
    masked, replaced = round(0.8 * count), round(0.9 * count)
    inputs_N[chosen[:masked]] = how.mask
    random = how.random.integers(0, how.vocabulary, replaced - masked)
    inputs_N[chosen[masked:replaced]] = torch.from_numpy(random)


class MaskedLMModule(nn.Module):
    """A masked model of `transformers` whose forward returns the loss summed over the hidden tokens."""

    figures = ("loss", "accuracy")

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def inputs(self, micro: MicroBatch, device: torch.device) -> dict[str, Tensor]:
        """The arguments of `forward`."""
        numbers_BT = torch.zeros_like(micro.input_ids_BT)  # of the documents, 0 where there is none
        for row, lengths in enumerate(micro.seq_lens):
            numbers = torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
            numbers_BT[row, : len(numbers)] = numbers
        alone = all(len(lengths) <= 1 for lengths in micro.seq_lens)
        same = numbers_BT > 0 if alone else (numbers_BT[:, :, None] == numbers_BT[:, None, :])[:, None]
        found = {
            "input_ids_BT": micro.input_ids_BT,
            "labels_BT": micro.labels_BT,
            "seen": same,
            **({} if alone else {"position_ids_BT": micro.position_ids_BT}),
        }
        return {name: tensor.to(device, non_blocking=True) for name, tensor in found.items()}

    def forward(
        self, input_ids_BT: Tensor, labels_BT: Tensor, seen: Tensor, position_ids_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`seen` is a mask of positions that are there, (B, T), or that see each other, (B, 1, T, T), bool.

        Returns:
            (loss summed over hidden tokens, float32 with gradient; [summed loss, right guesses], detached).
        """
        where = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
        logits_BTV = self.model(input_ids=input_ids_BT, attention_mask=seen, **where).logits
        hidden = labels_BT != IGNORED
        logits_NV, labels_N = logits_BTV[hidden].float(), labels_BT[hidden]
        loss = F.cross_entropy(logits_NV, labels_N, reduction="sum")
        right = (logits_NV.argmax(-1) == labels_N).sum().float()
        return loss, torch.stack([loss.detach(), right])
