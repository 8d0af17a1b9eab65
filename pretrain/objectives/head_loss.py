"""Cross-entropy through the head, chunk by chunk, without ever holding the logits of a whole batch.

The gradient with respect to a chunk's logits has a closed form, so it is applied to the hidden states and to the
weight while the chunk's logits are at hand, and the backward pass only scales. That needs no recomputation; the method
is that of the fused linear cross-entropy of Liger Kernel (https://arxiv.org/abs/2410.10989, section 3.2).

Shapes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

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


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 (autograd passes tensors one by one)
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, z: float,
        transform: LogitsTransform, chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wants = any(ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden_ND) if wants else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if wants and bias_V is not None else None
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        nll = hidden_ND.new_zeros((), dtype=torch.float32)
        top = hidden_ND.new_full((), -torch.inf, dtype=torch.float32)
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            how = (z, transform, wants)
            loss_c, nll_c, top_c, dlogits = _chunk(hidden_ND[rows], weight_VD, bias_V, labels_N[rows], how)
            total, nll, top = total + loss_c, nll + nll_c, torch.maximum(top, top_c)
            if dlogits is not None and grad_hidden is not None and grad_weight is not None:
                low = dlogits.to(hidden_ND.dtype)
                grad_hidden[rows] = low @ weight_VD
                if grad_weight.dtype == low.dtype:
                    _add_product(grad_weight, low.t(), hidden_ND[rows])
                else:
                    grad_weight += low.t() @ hidden_ND[rows]
                if grad_bias is not None:
                    grad_bias += dlogits.sum(0)
        if wants:
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
            ctx.weight_dtype = weight_VD.dtype
        metrics = torch.stack([nll, top])
        ctx.mark_non_differentiable(metrics)
        return total, metrics

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _metrics: Tensor) -> Any:  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        dtype = ctx.weight_dtype
        bias = None if grad_bias is None else (grad_bias * grad_total).to(dtype)
        return (
            grad_hidden * grad_total.to(grad_hidden.dtype),
            (grad_weight * grad_total).to(dtype),
            bias,
            None,
            None,
            None,
            None,
        )


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, how: tuple[float, LogitsTransform, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Loss, negative log-likelihood, largest logit of one chunk, and the gradient with respect to the raw logits."""
    z, transform, wants = how
    raw = hidden @ weight.t() if bias is None else torch.addmm(bias, hidden, weight.t())
    logits = transform(raw.float())
    top_N = logits.amax(-1, keepdim=True)
    probs = torch.exp(logits - top_N)
    sums = probs.sum(-1, keepdim=True)
    lse = (top_N + torch.log(sums)).squeeze(-1)
    mask = labels != IGNORE
    safe = labels.clamp_min(0)
    right = logits.gather(-1, safe[:, None]).squeeze(-1)
    nll = torch.where(mask, lse - right, 0.0).sum()
    loss = nll + z * torch.where(mask, lse.square(), 0.0).sum() if z else nll
    if not wants:
        return loss, nll, top_N.max(), None
    scale = (mask * (1.0 + 2.0 * z * lse))[:, None] / sums if z else mask[:, None] / sums
    dlogits = probs * scale
    dlogits.scatter_add_(-1, safe[:, None], -mask.to(dlogits.dtype)[:, None])
    if transform.cap:
        dlogits = dlogits * (1.0 - (logits / transform.cap).square())
    if transform.factor != 1.0:
        dlogits = dlogits * transform.factor
    return loss, nll, top_N.max(), dlogits


class LossHead(nn.Linear):
    """An output layer that, given labels, returns the loss instead of the logits.

    A module's own weight may be read only inside its forward under ZeRO 3 (the engine gathers it there), so the loss
    is computed by the head and not beside it.
    """

    z_loss: float
    transform: LogitsTransform
    chunk: int

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        """Logits (…, V); with `labels` (…) int64, -100 for none: (summed loss, [summed nll, largest logit])."""
        if labels is None:
            return super().forward(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        # A GPU wants large products; a CPU wants the logits in its cache (2,048 rows take 1.1 to 1.9 times as long).
        chunk = self.chunk or (2048 if hidden.is_cuda else 512)
        return _HeadLoss.apply(flat, self.weight, self.bias, labels.reshape(-1), self.z_loss, self.transform, chunk)

    @classmethod
    def adopt(cls, head: nn.Module, *, z_loss: float, transform: LogitsTransform, chunk: int) -> LossHead:
        """Turn an existing `nn.Linear` into a LossHead in place, keeping its (possibly tied or partitioned) weight."""
        assert isinstance(head, nn.Linear), type(head)
        head.__class__ = cls
        made: LossHead = head  # type: ignore[assignment]
        made.z_loss, made.transform, made.chunk = z_loss, transform, chunk
        return made
