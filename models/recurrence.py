"""Linear recurrences and causal convolutions over packed rows: what runs along a row begins anew in every document.

B rows, T positions, D channels; of state spaces H heads, P width of a head, G groups of heads, N size of a state;
C chunks of L positions. `positions_BT` (or one row for all, (1, T)) restart at 0 in every document.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def linear_scan(decay_BTD: Tensor, inputs_BTD: Tensor, chunk: int = 0) -> Tensor:
    """States h[t] = decay[t] · h[t - 1] + inputs[t] from h[-1] = 0, in the dtype of the arguments, any length.

    A decay of 0 forgets all before it. In chunks: first how each ends by itself, then its true start from the ends
    before it, then its states, all chunks at once; `chunk` positions, 0 for the root of T, where the number of
    sequential operations is least (Blelloch, "Prefix sums and their applications", 1990). Decays in [0, 1] are only
    ever multiplied, so nothing overflows, and products that underflow are 0 as they should be. Differentiable once.
    """
    return _scan(decay_BTD, inputs_BTD, chunk or max(1, round(decay_BTD.shape[1] ** 0.5)))


# An operator: compiled, its loops would be unrolled into a graph that takes minutes to build, for no gain.
@torch.library.custom_op("millrace::linear_scan", mutates_args=())
def _scan(decay: Tensor, inputs: Tensor, chunk: int) -> Tensor:
    batch, length, width = inputs.shape
    chunks = -(-length // chunk)
    fill = (0, 0, 0, chunks * chunk - length)
    decay_BCLD = F.pad(decay, fill).view(batch, chunks, chunk, width)
    inputs_BCLD = F.pad(inputs, fill).view(batch, chunks, chunk, width)
    end_BCD, product_BCD = inputs_BCLD[:, :, 0].clone(), decay_BCLD[:, :, 0].clone()
    for at in range(1, chunk):
        end_BCD.mul_(decay_BCLD[:, :, at]).add_(inputs_BCLD[:, :, at])
        product_BCD.mul_(decay_BCLD[:, :, at])
    before_BCD = torch.zeros_like(end_BCD)
    for at in range(1, chunks):
        torch.addcmul(end_BCD[:, at - 1], product_BCD[:, at - 1], before_BCD[:, at - 1], out=before_BCD[:, at])
    states_BCLD, state_BCD = torch.empty_like(inputs_BCLD), before_BCD
    for at in range(chunk):
        torch.addcmul(inputs_BCLD[:, :, at], decay_BCLD[:, :, at], state_BCD, out=states_BCLD[:, :, at])
        state_BCD = states_BCLD[:, :, at]
    return states_BCLD.view(batch, -1, width)[:, :length].contiguous()


@_scan.register_fake
def _(decay: Tensor, inputs: Tensor, chunk: int) -> Tensor:
    return inputs.new_empty(inputs.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.chunk = inputs[2]
    ctx.save_for_backward(inputs[0], output)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    """The gradient of the states is a recurrence too, from the end: g[t] = grad[t] + decay[t + 1] · g[t + 1]."""
    decay, states = ctx.saved_tensors
    later = F.pad(decay[:, 1:], (0, 0, 0, 1))
    found = _scan(later.flip(1), grad.flip(1), ctx.chunk).flip(1)
    return found * F.pad(states[:, :-1], (0, 0, 1, 0)), found, None


_scan.register_autograd(_differentiate, setup_context=_keep)


class DocumentConv1d(nn.Conv1d):
    """A causal depthwise convolution that does not reach across the borders of documents."""

    @classmethod
    def adopt(cls, convolution: nn.Conv1d) -> None:
        """Make an nn.Conv1d of any model one of these, in place; its parameters stay as they are."""
        convolution.__class__ = cls

    def forward(self, inputs_BDT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """As nn.Conv1d, or with positions (B, D, T) of what stands in the same document."""
        if positions_BT is None:
            return super().forward(inputs_BDT)
        weights_WD = self.weight[:, 0].t()
        inputs_BTD = inputs_BDT.transpose(1, 2).to(weights_WD.dtype)
        places_BT = positions_BT.minimum(torch.arange(inputs_BTD.shape[1], device=inputs_BTD.device))
        last = len(weights_WD) - 1
        out_BTD = inputs_BTD * weights_WD[last]
        for back in range(1, last + 1):  # elementwise: a quarter faster than a depthwise convolution of torch on a CPU
            seen_BT1 = (places_BT >= back)[:, :, None].to(inputs_BTD.dtype)
            out_BTD = torch.addcmul(out_BTD, inputs_BTD.roll(back, 1) * seen_BT1, weights_WD[last - back])
        return (out_BTD if self.bias is None else out_BTD + self.bias).transpose(1, 2)


def exactly(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Compute in the dtypes that are given, under autocast too; devices that have none (meta) always do."""
    there = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if there else contextlib.nullcontext()


def documents(positions_BT: Tensor) -> Tensor:
    """The number of its document, from 1 on, for each position of a row, int64 (B, T)."""
    return (positions_BT == 0).cumsum(-1)


def state_space_scan(
    inputs_BTHP: Tensor, log_decay_BTH: Tensor, in_BTGN: Tensor, out_BTGN: Tensor, document_BT: Tensor, chunk: int
) -> Tensor:
    """What out[t] reads of the states S[t] = exp(log_decay[t]) · S[t - 1] + inputs[t] ⊗ in[t]: (B, T, H, P), fp32.

    Mamba-2's dual form (Dao and Gu, https://arxiv.org/abs/2405.21060, section 6): inside a chunk of positions an
    attention whose scores decay, between chunks a recurrence of their last states. S begins at 0 in each document.
    `log_decay` is at most 0; its sums are taken in float64, for differences of large ones decide about small ones.
    """
    batch, length, heads, width = inputs_BTHP.shape
    groups, size = in_BTGN.shape[2:]
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    more = chunks * chunk - length

    def chunked(tensor: Tensor, *shape: int) -> Tensor:
        return F.pad(tensor, (*(0, 0) * (tensor.ndim - 2), 0, more)).reshape(batch, chunks, chunk, *shape)

    each = heads // groups  # heads of a group (written K)
    kind = torch.promote_types(inputs_BTHP.dtype, torch.float32)
    inputs_BCGKLP = chunked(inputs_BTHP.to(kind), groups, each, width).permute(0, 1, 3, 4, 2, 5)
    in_BCGLN = chunked(in_BTGN.to(kind), groups, size).transpose(2, 3)
    out_BCGLN = chunked(out_BTGN.to(kind), groups, size).transpose(2, 3)
    total_BCGKL = chunked(log_decay_BTH.double(), groups, each).cumsum(2).permute(0, 1, 3, 4, 2)
    document_BCL = chunked(document_BT.expand(batch, -1))
    last_BC = document_BCL[:, :, -1]
    before_BC = F.pad(last_BC[:, :-1], (1, 0))  # of the chunk before; 0 is none

    def decay(log: Tensor, seen: Tensor) -> Tensor:
        return torch.where(seen, log.to(kind), -torch.inf).exp()

    # inside the chunks
    same_BCLL = (document_BCL[:, :, :, None] == document_BCL[:, :, None, :]).tril()
    scores_BCGLL = out_BCGLN @ in_BCGLN.transpose(-1, -2)
    between = decay(total_BCGKL[..., :, None] + (-total_BCGKL)[..., None, :], same_BCLL[:, :, None, None])
    found = (scores_BCGLL[:, :, :, None] * between) @ inputs_BCGKLP

    # the states at their ends, by themselves and then with what came before
    to_end = decay(total_BCGKL[..., -1:] - total_BCGKL, (document_BCL == last_BC[:, :, None])[:, :, None, None])
    ends_BCGKPN = (inputs_BCGKLP * to_end[..., None]).transpose(-1, -2) @ in_BCGLN[:, :, :, None]
    through = decay(total_BCGKL[..., -1], (last_BC == before_BC)[:, :, None, None])
    through = through[..., None, None].expand(ends_BCGKPN.shape)
    states = linear_scan(through.flatten(2), ends_BCGKPN.flatten(2)).view(ends_BCGKPN.shape)
    starts = F.pad(states[:, :-1], (*(0, 0) * 4, 1, 0))

    since = decay(total_BCGKL, (document_BCL == before_BC[:, :, None])[:, :, None, None])
    found = found + (out_BCGLN[:, :, :, None] @ starts.transpose(-1, -2)) * since[..., None]
    return found.permute(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, width)[:, :length]
