"""A frozen copy of a module that follows it: the mean of its weights over time, sharded like them.

Mean teacher (Tarvainen and Valpola, https://arxiv.org/abs/1703.01780); DINO and BYOL use the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Teacher(nn.Module):
    """Holds a module whose parameters are not trained by a gradient. It belongs into the module of the engine that
    trains the student, so that ZeRO 3 partitions it and every checkpoint holds it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)

    @torch.no_grad()
    def forward(self, *arguments: object, **named: object) -> object:
        """As the module's, without a gradient."""
        return self.module(*arguments, **named)

    def follow(self, student: nn.Module, decay: float | Tensor) -> None:
        """See `follow`."""
        follow(self.module, student, decay)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float | Tensor, rest: nn.Module | None = None) -> None:
    """`decay` times the teacher, plus the rest of the student; call it on every rank after a step that was taken.

    As a tensor (1,) `decay` may come from a buffer, without a read of it by the host.

    Where parameters are partitioned each rank moves its own part: gathering them, and writing on all ranks, would lose
    the writes in silence. `rest` is a module of the same shape, zeros at first, that keeps what the teacher's weights
    cannot hold: in bf16 a change of less than 1 part in 256 would be lost, and that is what most changes are.
    """
    pairs: list[tuple[Any, Any]] = list(zip(teacher.parameters(), student.parameters(), strict=True))
    left: list[Any] = [None] * len(pairs) if rest is None else list(rest.parameters())
    held: list[Any] = [mine for mine, _ in pairs] + [one for one in left if one is not None]
    kept = [one for one in held if getattr(one, "ds_persist", False)]  # also held whole by every rank
    if kept:
        kept[0].partition(kept)
    share = 1 - decay
    for pair, one in zip(pairs, left, strict=True):
        mine, theirs, more = (getattr(part, "ds_tensor", part) for part in (*pair, one))
        if more is None:
            mine.lerp_(theirs.to(mine.dtype), share.to(mine.dtype) if isinstance(share, Tensor) else share)
        else:
            whole = (mine.float() + more.float()).lerp_(theirs.float(), share)
            mine.copy_(whole)
            more.copy_(whole - mine.float())
    if kept:
        kept[0].all_gather(kept)
    for buffer, moved in zip(teacher.buffers(), student.buffers(), strict=True):
        buffer.copy_(moved)
