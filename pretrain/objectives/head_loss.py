"""Cross-entropy through the head, chunk by chunk, without ever holding the logits of a whole batch.

The gradient with respect to a chunk's logits has a closed form, so it is applied to the hidden states and to the
weight while the chunk's logits are at hand, and the backward pass only scales. That needs no recomputation; the method
is that of the fused linear cross-entropy of Liger Kernel (https://arxiv.org/abs/2410.10989, section 3.2).

Targets may have weights of their own. Shapes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from millrace.models.heads import LogitsTransform

IGNORE = -100


# An operator, because a compiled `addmm_` becomes `addmm`, which copies the gradient for every chunk: 3% of a step.
@torch.library.custom_op("millrace::add_product", mutates_args=("into",))
def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """`into += left @ right`, in place."""
    into.addmm_(left, right)


@_add_product.register_fake
def _(into: Tensor, left: Tensor, right: Tensor) -> None:
    return None


# Rows of a chunk and their raw logits -> ((loss summed over them, other sums …), largest logit, and the gradient of the
# loss with respect to the raw logits, where it is wanted).
Judge = Callable[[slice, Tensor], tuple[tuple[Tensor, ...], Tensor, Tensor | None]]


class ChunkedLoss(torch.autograd.Function):
    """A loss of the logits of a head whose gradient with respect to a chunk of them has a closed form.

    A subclass's forward calls `run`; it takes hidden states, weight and bias first.
    """

    @staticmethod
    def run(ctx: Any, given: tuple[Tensor, Tensor, Tensor | None], chunk: int, judge: Judge) -> tuple[Tensor, Tensor]:
        """(summed loss; the other sums and the largest logit) of `given`, which is hidden_ND, weight_VD and bias_V."""
        hidden_ND, weight_VD, bias_V = given
        wants = any(ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden_ND) if wants else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if wants and bias_V is not None else None
        weight, bias = weight_VD.to(hidden_ND.dtype), None if bias_V is None else bias_V.to(hidden_ND.dtype)
        sums: tuple[Tensor, ...] = ()
        top = hidden_ND.new_full((), -torch.inf, dtype=torch.float32)
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden = hidden_ND[rows]
            raw = hidden @ weight.t() if bias is None else torch.addmm(bias, hidden, weight.t())
            sums_c, top_c, dlogits = judge(rows, raw)
            sums = tuple(a + b for a, b in zip(sums, sums_c, strict=True)) if sums else sums_c
            top = torch.maximum(top, top_c)
            if dlogits is not None and grad_hidden is not None and grad_weight is not None:
                low = dlogits.to(hidden_ND.dtype)
                grad_hidden[rows] = low @ weight
                if grad_weight.dtype == low.dtype:
                    _add_product(grad_weight, low.t(), hidden)
                else:
                    grad_weight += low.t() @ hidden
                if grad_bias is not None:
                    grad_bias += dlogits.sum(0)
        if wants:
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
            ctx.weight_dtype = weight_VD.dtype
        total, *others = sums
        metrics = torch.stack([*others, top])
        ctx.mark_non_differentiable(metrics)
        return total, metrics

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_others: Tensor | None) -> Any:  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        dtype = ctx.weight_dtype
        bias = None if grad_bias is None else (grad_bias * grad_total).to(dtype)
        grads = grad_hidden * grad_total.to(grad_hidden.dtype), (grad_weight * grad_total).to(dtype), bias
        return (*grads, *(None for _ in ctx.needs_input_grad[3:]))


class _HeadLoss(ChunkedLoss):
    @staticmethod
    def forward(  # noqa: PLR0913 (autograd passes tensors one by one)
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor,
        shares_N: Tensor | None, z: float, transform: LogitsTransform, chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        how = z, transform, any(ctx.needs_input_grad[:3])
        each = None if shares_N is None else hidden_ND.new_empty(len(labels_N), dtype=torch.float32)

        def judge(rows: slice, raw: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
            loss, each_c, top, dlogits = _chunk(raw, labels_N[rows], None if shares_N is None else shares_N[rows], how)
            if each is not None:
                each[rows] = each_c
            return (loss, each_c.sum()), top, dlogits

        total, metrics = ChunkedLoss.run(ctx, (hidden_ND, weight_VD, bias_V), chunk, judge)
        ctx.mark_non_differentiable(*([metrics] if each is None else [metrics, each]))
        return total, metrics, each


def _chunk(
    raw: Tensor, labels: Tensor, shares: Tensor | None, how: tuple[float, LogitsTransform, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Loss, negative log-likelihood of each target, largest logit of one chunk, and the gradient of the raw logits."""
    z, transform, wants = how
    logits = transform(raw.float())
    top_N = logits.amax(-1, keepdim=True)
    probs = torch.exp(logits - top_N)
    sums = probs.sum(-1, keepdim=True)
    lse = (top_N + torch.log(sums)).squeeze(-1)
    mask = labels != IGNORE
    share = mask if shares is None else mask * shares
    safe = labels.clamp_min(0)
    right = logits.gather(-1, safe[:, None]).squeeze(-1)
    each = torch.where(mask, lse - right, 0.0)
    loss = each.sum() if shares is None else (each * share).sum()
    if z:
        loss = loss + z * (torch.where(mask, lse.square(), 0.0) if shares is None else share * lse.square()).sum()
    if not wants:
        return loss, each, top_N.max(), None
    scale = (share * (1.0 + 2.0 * z * lse))[:, None] / sums if z else share[:, None] / sums
    dlogits = probs * scale
    dlogits.scatter_add_(-1, safe[:, None], -share.to(dlogits.dtype)[:, None])
    return loss, each, top_N.max(), through(transform, logits, dlogits)


def through(transform: LogitsTransform, logits: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with respect to raw logits, from that with respect to the transformed `logits`."""
    if transform.cap:
        gradient = gradient * (1.0 - (logits / transform.cap).square())
    if transform.factor != 1.0:
        gradient = gradient * transform.factor
    return gradient


class LossHead(nn.Linear):
    """An output layer that, given labels, returns the loss instead of the logits.

    A module's own weight may be read only inside its forward under ZeRO 3 (the engine gathers it there), so the loss
    is computed by the head and not beside it.
    """

    z_loss: float
    transform: LogitsTransform
    chunk: int

    def forward(  # type: ignore[override]
        self, hidden: Tensor, labels: Tensor | None = None, shares: Tensor | None = None
    ) -> Any:
        """Logits (…, V); with `labels` (…) int64, -100 for none: (summed loss, [summed nll, largest logit]).

        With `shares` (…) float32 as well, by which each target's loss counts, the nll (N,) of each target comes third.
        """
        if labels is None:
            return super().forward(hidden)
        flat, chunk = self.rows(hidden)
        targets = (labels.reshape(-1), None if shares is None else shares.reshape(-1))
        found = _HeadLoss.apply(flat, self.weight, self.bias, *targets, self.z_loss, self.transform, chunk)
        return found[:2] if shares is None else found

    def rows(self, hidden: Tensor) -> tuple[Tensor, int]:
        """Hidden states (N, D) in the dtype of products, and how many of them are a chunk."""
        flat, device = hidden.reshape(-1, hidden.shape[-1]), hidden.device.type
        if torch.is_autocast_enabled(device):
            flat = flat.to(torch.get_autocast_dtype(device))
        # A GPU wants large products; a CPU wants the logits in its cache (2,048 rows take 1.1 to 1.9 times as long).
        return flat, self.chunk or (2048 if hidden.is_cuda else 512)

    @classmethod
    def adopt(cls, head: nn.Module, *, z_loss: float, transform: LogitsTransform, chunk: int) -> LossHead:
        """Turn an existing `nn.Linear` into a LossHead in place, keeping its (possibly tied or partitioned) weight."""
        assert isinstance(head, nn.Linear), type(head)
        head.__class__ = cls
        made: LossHead = head  # type: ignore[assignment]
        made.z_loss, made.transform, made.chunk = z_loss, transform, chunk
        return made
