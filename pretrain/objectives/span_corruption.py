"""Span corruption: T5 (Raffel et al., https://arxiv.org/abs/1910.10683, section 3.1.4).

Spans of a row are replaced by sentinels in what the encoder reads; the decoder writes each sentinel and what stood
there. Spans are drawn as `random_spans_noise_mask` of the paper's code does. B rows, S and T positions of the encoder
and the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from millrace.core.errors import UserError
from millrace.data.batch import IGNORED, MicroBatch
from millrace.models.bridge import SEQ2SEQ, build_model, hf_config
from millrace.pretrain.objectives.base import OneModule, Setting, model_files


@dataclass(frozen=True)
class Corrupted:
    """What encoder and decoder are given."""

    input_ids_BS: Tensor
    mask_BS: Tensor  # True where there is a token
    decoder_ids_BT: Tensor
    labels_BT: Tensor


class SpanCorruption(OneModule):
    """Write what stood in the gaps of a text."""

    of_text = False

    def __init__(self, model: Any, setting: Setting) -> None:
        super().__init__(SpanCorruptionModule(model))
        self.name, self._model, self._section = setting.model.kind, model, setting.objective
        self._first = setting.tokenizer.vocab_size  # sentinel
        self.tokenizer = _with_sentinels(setting)
        self._bos, self._eos = setting.tokenizer.bos_id, setting.tokenizer.eos_id

    @classmethod
    def check(cls, setting: Setting) -> None:
        hf_config(setting.model, _with_sentinels(setting).vocab_size, setting.sequence_length, SEQ2SEQ)
        if setting.rows != "alone":
            raise UserError(
                f"objective.kind = 'span_corruption' reads one document in a row: set data.rows = 'alone', not "
                f"'{setting.rows}'"
            )

    @classmethod
    def build(cls, setting: Setting) -> SpanCorruption:
        vocabulary = _with_sentinels(setting).vocab_size
        length, seed = setting.sequence_length, setting.seed
        model = build_model(setting.model, vocabulary, length, seed, setting.zero3, SEQ2SEQ)
        model.config.decoder_start_token_id = setting.tokenizer.bos_id
        model.config.eos_token_id = model.config.pad_token_id = setting.tokenizer.eos_id
        return cls(model, setting)

    def view(self, micro: MicroBatch) -> Corrupted:
        rows = []
        for row, (seed, lengths) in enumerate(zip(micro.seeds.tolist(), micro.seq_lens, strict=True)):
            tokens = micro.input_ids_BT[row, : sum(lengths)].numpy()
            noise = noise_mask(len(tokens), self._section.share, self._section.span, np.random.default_rng(seed))
            rows.append(corrupt(tokens, noise, self._first, self._eos))
        inputs, mask = _pad([read for read, _ in rows], self._eos)
        labels, real = _pad([written for _, written in rows], self._eos)
        decoder = torch.cat([torch.full_like(labels[:, :1], self._bos), labels[:, :-1]], 1)
        return Corrupted(inputs, mask, decoder, labels.masked_fill(~real, IGNORED))

    def files(self) -> dict[str, str]:
        return model_files(self._model)


def _with_sentinels(setting: Setting) -> Any:
    count = noise_spans(setting.sequence_length, setting.objective.share, setting.objective.span)[1]
    return setting.tokenizer.extended({}, [f"<extra_id_{number}>" for number in range(count)])


def noise_spans(length: int, share: float, mean: float) -> tuple[int, int]:
    """(tokens, spans) that are replaced in a row of `length`."""
    tokens = min(max(round(length * share), 1), length - 1)
    return tokens, max(1, min(round(tokens / mean), length - tokens))


def noise_mask(length: int, share: float, mean: float, random: np.random.Generator) -> np.ndarray:
    """Which tokens of a row are replaced, bool (length,); a row of one token keeps it, and none begins with a gap."""
    if length < 2:
        return np.zeros(length, bool)
    tokens, spans = noise_spans(length, share, mean)
    kept, gone = (_segments(count, spans, random) for count in (length - tokens, tokens))
    return np.repeat(np.tile([False, True], spans), np.stack([kept, gone], 1).reshape(-1))


def _segments(total: int, parts: int, random: np.random.Generator) -> np.ndarray:
    """`total` cut at random into `parts` of 1 or more."""
    borders = np.sort(random.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], borders, [total]]))


def corrupt(tokens: np.ndarray, noise: np.ndarray, first: int, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """What the encoder reads and the decoder writes, both ended by `eos`; sentinel n is token `first + n`."""
    starts = noise & ~np.concatenate([[False], noise[:-1]])
    sentinels = first + np.cumsum(starts) - 1
    read = np.where(starts, sentinels, tokens)[~noise | starts]
    places = np.flatnonzero(starts)
    written = np.insert(tokens[noise], (np.cumsum(noise) - 1)[places], sentinels[places])
    return np.append(read, eos), np.append(written, eos)


def _pad(rows: list[np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    """Rows as one int64 tensor, and where there is something."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.full((len(rows), int(lengths.max())), fill)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


class SpanCorruptionModule(nn.Module):
    """A sequence-to-sequence model of `transformers`; its forward returns the loss summed over the decoder's tokens."""

    figures = ("loss", "accuracy")

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def inputs(self, view: Corrupted, device: torch.device) -> dict[str, Tensor]:
        """The arguments of `forward`."""
        return {name: tensor.to(device, non_blocking=True) for name, tensor in vars(view).items()}

    def forward(
        self, input_ids_BS: Tensor, mask_BS: Tensor, decoder_ids_BT: Tensor, labels_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns: (loss summed over targets, float32 with gradient; [summed loss, right guesses], detached)."""
        logits_BTV = self.model(
            input_ids=input_ids_BS, attention_mask=mask_BS.long(), decoder_input_ids=decoder_ids_BT, use_cache=False
        ).logits.float()
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
        right = (logits_BTV.argmax(-1) == labels_BT).sum().float()
        return loss, torch.stack([loss.detach(), right])
