"""Our model and tokenizer as lm-eval's model: every request starts with BOS, as every document did in training."""

from __future__ import annotations

import sys
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast

from millrace.core.errors import UserError
from millrace.eval.subject import Subject


class SubjectLM(HFLM):
    """lm-eval's model for transformers around a `Subject`; it computes, only the encoding is ours."""

    def __init__(self, subject: Subject, batch: int) -> None:
        tokenizer = subject.tokenizer
        border = tokenizer.backend.id_to_token(tokenizer.eos_id)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, eos_token=border, pad_token=border)
        super().__init__(
            pretrained=subject.model,
            tokenizer=fast,
            batch_size=batch,
            max_length=subject.context,
            prefix_token_id=tokenizer.bos_id,
        )
        self._ours = tokenizer

    def tok_encode(self, string: str, *_: Any, **__: Any) -> list[int]:
        """Without border tokens: lm-eval puts BOS before a text that it scores from the start."""
        return self._ours.encode([string])[0].tolist()

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        if len(after) > self.max_length:
            raise UserError(
                f"an answer of {len(after)} tokens is longer than the model's context of {self.max_length}: "
                f"'{continuation[:40]}…'; leave this task out"
            )
        return [self._ours.bos_id, *before], after

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, mask), each (B, T), for generation: padded on the left, cut on the left."""
        rows = [[self._ours.bos_id, *self.tok_encode(s)][-(left_truncate_len or 0) :] for s in strings]
        width = max(map(len, rows))
        ids_BT = torch.full((len(rows), width), self._ours.eos_id)
        mask_BT = torch.zeros_like(ids_BT)
        for number, row in enumerate(rows):
            place = slice(width - len(row), None) if padding_side == "left" else slice(len(row))
            ids_BT[number, place], mask_BT[number, place] = torch.tensor(row), 1
        return ids_BT, mask_BT

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's, with a progress bar on a terminal only."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any) -> Any:
        quiet = disable_tqdm or not sys.stderr.isatty()
        return super()._loglikelihood_tokens(requests, disable_tqdm=quiet, **kwargs)
