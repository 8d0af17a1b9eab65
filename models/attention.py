"""Attention document by document: what a mask over packed rows computes, without the work that the mask
discards.

Registered with transformers as the attention implementation "documents". Called with a table of document
starts (see `document_starts`) in the place of a 4-D mask, it attends causally inside each document; called
with anything else it is transformers' "sdpa". The table's shape depends on the batch's shape only and the
loop over documents lies inside a custom operator, so that `torch.compile` neither breaks the graph nor
recompiles when document lengths change.

B rows, H heads, T positions, D head width.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "documents"
PADDING = -1

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def document_starts(seq_lens: list[list[int]], length: int) -> torch.Tensor:
    """int32 (B, 1, 1, T): for each position the start of its document in its row, -1 for padding.

    `seq_lens` are the document lengths of each row in tokens, `length` is T. Four dimensions, because
    transformers passes a 4-D mask unchanged to every attention layer.
    """
    table = torch.full((len(seq_lens), 1, 1, length), PADDING, dtype=torch.int32)
    for row, lengths in enumerate(seq_lens):
        assert sum(lengths) <= length, f"documents of {sum(lengths)} tokens in a row of {length}"
        start = 0
        for size in lengths:
            table[row, 0, 0, start : start + size] = start
            start += size
    return table


def documents_attention(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface; returns (B, T, H, D) and no weights."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    if not _operator_serves(query_BHTD, value_BHTD, kwargs):
        mask_B1TT = mask_of(attention_mask, window)
        return sdpa_attention_forward(module, query_BHTD, key_BHTD, value_BHTD, mask_B1TT, **kwargs)
    groups = query_BHTD.shape[1] // key_BHTD.shape[1]
    if groups > 1:
        key_BHTD = key_BHTD.repeat_interleave(groups, dim=1)
        value_BHTD = value_BHTD.repeat_interleave(groups, dim=1)
    scaling = kwargs.get("scaling") or query_BHTD.shape[-1] ** -0.5
    dtype = value_BHTD.dtype  # under autocast, rotary embeddings leave queries and keys in fp32
    heads = query_BHTD.to(dtype), key_BHTD.to(dtype), value_BHTD
    out_BHTD, _ = attend(*heads, attention_mask, float(scaling), int(window or 0))
    return out_BHTD.transpose(1, 2).contiguous(), None


def _operator_serves(query: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    plain = not kwargs.get("dropout") and kwargs.get("softcap") is None and kwargs.get("position_bias") is None
    return plain and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def mask_of(starts_B11T: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """The boolean mask (B, 1, T, T) of a table of starts; true where a query (row) sees a key (column).

    Padding sees itself only, so that no row of the softmax is empty.
    """
    at_T = torch.arange(starts_B11T.shape[-1], device=starts_B11T.device)
    query_T1, key_1T = at_T[:, None], at_T[None, :]
    starts_B1T1 = starts_B11T.transpose(-1, -2)
    seen = (key_1T <= query_T1) & (key_1T >= starts_B1T1) & (starts_B1T1 != PADDING)
    if window:
        seen = seen & (query_T1 - key_1T < window)
    return seen | (query_T1 == key_1T)


def _spans(starts_B11T: torch.Tensor) -> list[tuple[int, int, int]]:
    """(row, start, end) of every document."""
    table_BT = starts_B11T[:, 0, 0].numpy()  # called twice a layer, so never position by position
    begins_BT = table_BT == np.arange(table_BT.shape[1])
    spans = []
    for row, used in enumerate((table_BT != PADDING).sum(1).tolist()):
        begins = np.flatnonzero(begins_BT[row]).tolist()
        spans += [(row, start, end) for start, end in itertools.pairwise([*begins, used])]
    return spans


def _is_plain(starts_B11T: torch.Tensor, window: int) -> bool:
    """Whether every row is one document without padding, all of it inside the window: causal attention as it is."""
    length = starts_B11T.shape[-1]
    return not 0 < window < length and not starts_B11T.any()


def _window_mask(size: int, window: int, like: torch.Tensor) -> torch.Tensor | None:
    """Additive mask of a document that is longer than the sliding window; None where causality suffices."""
    if not 0 < window < size:
        return None
    at = torch.arange(size)
    seen = (at[None, :] <= at[:, None]) & (at[:, None] - at[None, :] < window)
    return torch.zeros(size, size, dtype=like.dtype).masked_fill_(~seen, float("-inf"))[None, None]


@torch.library.custom_op("millrace::attend_documents", mutates_args=(), device_types="cpu")
def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention inside each document: output (B, H, T, D), zero on padding, and log-sum-exp (B, T, H)."""
    batch, heads, length, _ = query.shape
    if _is_plain(starts, window):
        out, lse_BHT = _forward(query, key, value, 0.0, True, scale=scale)
        return out.contiguous(), lse_BHT.transpose(1, 2).contiguous()
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = query.new_zeros(batch, length, heads, dtype=torch.promote_types(query.dtype, torch.float32))
    for row, start, end in _spans(starts):
        part = (slice(row, row + 1), slice(None), slice(start, end))
        mask = _window_mask(end - start, window, query)
        out[part], lse_part = _forward(
            query[part], key[part], value[part], 0.0, mask is None, attn_mask=mask, scale=scale
        )
        lse[row : row + 1, start:end] = lse_part.transpose(1, 2)
    return out, lse


@attend.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, _ = query.shape
    kind = torch.promote_types(query.dtype, torch.float32)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty(batch, length, heads, dtype=kind)


@torch.library.custom_op("millrace::attend_documents_backward", mutates_args=(), device_types="cpu")
def attend_backward(
    grad: torch.Tensor,
    saved: list[torch.Tensor],
    starts: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; `saved` are query, key, value, output and log-sum-exp."""
    query, key, value, out, lse = saved
    if _is_plain(starts, window):
        made = _backward(grad, query, key, value, out, lse.transpose(1, 2), 0.0, True, scale=scale)
        return made[0].contiguous(), made[1].contiguous(), made[2].contiguous()
    grads = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    for row, start, end in _spans(starts):
        part = (slice(row, row + 1), slice(None), slice(start, end))
        mask = _window_mask(end - start, window, query)
        tensors = [t[part] for t in (grad, query, key, value, out)]
        lse_part = lse[row : row + 1, start:end].transpose(1, 2)
        parts = _backward(*tensors, lse_part, 0.0, mask is None, attn_mask=mask, scale=scale)
        for whole, made in zip(grads, parts, strict=True):
            whole[part] = made
    return grads[0], grads[1], grads[2]


@attend_backward.register_fake
def _(
    grad: torch.Tensor,
    saved: list[torch.Tensor],
    starts: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in saved[:3]]
    return made[0], made[1], made[2]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, starts, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output, starts)


def _differentiate(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *saved, starts = ctx.saved_tensors
    grads = attend_backward(grad_out, saved, starts, ctx.scale, ctx.window)
    return *grads, None, None, None


attend.register_autograd(_differentiate, setup_context=_keep)
AttentionInterface.register(NAME, documents_attention)
# Without a table (evaluation, generation) the masks are those of sdpa.
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
