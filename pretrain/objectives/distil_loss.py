"""Cross-entropy and the divergence from a teacher through the head, chunk by chunk, without all logits of either.

As `head_loss`: the gradient with respect to a chunk's logits has a closed form. With temperature T, logits s of the
student and t of the teacher, p = softmax(t / T) and q = softmax(s / T), the loss of a target is

    (1 - weight) · -log softmax(s)[target]  +  weight · T² · sum p (log p - log q)

and its gradient (1 - weight) (softmax(s) - onehot) + weight · T · (q - p): Hinton et al.,
https://arxiv.org/abs/1503.02531, section 2, whose T² keeps both parts in proportion whatever the temperature.

Shapes: N tokens, D and E hidden of student and teacher, V and W rows of their heads, K tokens of the tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from millrace.models.heads import LogitsTransform
from millrace.pretrain.objectives.head_loss import IGNORE, ChunkedLoss, LossHead, through


class Taught(NamedTuple):
    """What a teacher makes of a batch before its head, and that head; without gradients."""

    hidden: Tensor  # (…, E)
    weight_WE: Tensor
    bias_W: Tensor | None


@dataclass(frozen=True)
class Terms:
    """How the parts of the loss are taken; `transform` is that of the student's logits, `theirs` of the teacher's."""

    weight: float
    temperature: float
    z_loss: float
    tokens: int  # K: rows of either head behind them are spare, and are not compared
    transform: LogitsTransform
    theirs: LogitsTransform


class _DistilLoss(ChunkedLoss):
    @staticmethod
    def forward(  # noqa: PLR0913 (autograd passes tensors one by one)
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, hidden_NE: Tensor,
        weight_WE: Tensor, bias_W: Tensor | None, terms: Terms, chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wants = any(ctx.needs_input_grad[:3])

        def judge(rows: slice, raw: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
            theirs = terms.theirs(F.linear(hidden_NE[rows], weight_WE, bias_W).float())
            return _chunk(raw, theirs, labels_N[rows], terms, wants)

        return ChunkedLoss.run(ctx, (hidden_ND, weight_VD, bias_V), chunk, judge)


def _chunk(
    raw: Tensor, theirs_NW: Tensor, labels: Tensor, terms: Terms, wants: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor | None]:
    """((loss, nll, divergence), largest logit) of a chunk, and the gradient with respect to its raw logits."""
    weight, heat, known = terms.weight, terms.temperature, slice(terms.tokens)
    logits_NV = terms.transform(raw.float())
    lse_N = logits_NV.logsumexp(-1)
    mask_N, safe_N = labels != IGNORE, labels.clamp_min(0)
    nll = torch.where(mask_N, lse_N - logits_NV.gather(-1, safe_N[:, None])[:, 0], 0.0).sum()
    told_NK = (theirs_NW[:, known] / heat).log_softmax(-1)
    mine_NK = (logits_NV[:, known] / heat).log_softmax(-1)
    p_NK = told_NK.exp()
    divergence = torch.where(mask_N, (p_NK * (told_NK - mine_NK)).sum(-1), 0.0).sum()
    loss = (1 - weight) * nll + weight * heat**2 * divergence
    if terms.z_loss:
        loss = loss + terms.z_loss * torch.where(mask_N, lse_N.square(), 0.0).sum()
    sums, top = (loss, nll, divergence), logits_NV.max()
    if not wants:
        return sums, top, None
    probs_NV = torch.exp(logits_NV - lse_N[:, None])
    gradient = probs_NV * (1 - weight + 2 * terms.z_loss * lse_N)[:, None]
    gradient.scatter_add_(-1, safe_N[:, None], torch.full_like(lse_N, weight - 1)[:, None])
    gradient[:, known] += weight * heat * (mine_NK.exp() - p_NK)
    return sums, top, through(terms.transform, logits_NV, gradient * mask_N[:, None])


class DistilHead(LossHead):
    """An output layer that, given labels and a teacher, returns the loss instead of the logits; see `LossHead`."""

    terms: Terms

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        shares: Tensor | None = None,
        taught: Taught | None = None,
    ) -> Any:
        """With a teacher, (summed loss, [summed nll, summed divergence, largest logit]); as `LossHead` without."""
        if labels is None or taught is None:
            return super().forward(hidden, labels, shares)
        (flat, chunk), labels = self.rows(hidden), labels.reshape(-1)
        theirs = taught.hidden.reshape(-1, taught.hidden.shape[-1])
        return _DistilLoss.apply(flat, self.weight, self.bias, labels, theirs, *taught[1:], self.terms, chunk)
