"""A frozen copy of a module that follows it: the mean of its weights over time, sharded like them.

Mean teacher (Tarvainen and Valpola, https://arxiv.org/abs/1703.01780); DINO and BYOL use the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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

    @torch.no_grad()
    def follow(self, student: nn.Module, decay: float) -> None:
        """`decay` times the teacher, plus the rest of the student; call it on every rank after a step that was taken.

        Where parameters are partitioned each rank moves its own part: gathering them, and writing on all ranks, would
        lose the writes in silence.
        """
        pairs: list[tuple[Any, Any]] = list(zip(self.module.parameters(), student.parameters(), strict=True))
        kept = [mine for mine, _ in pairs if getattr(mine, "ds_persist", False)]  # also held whole by every rank
        if kept:
            kept[0].partition(kept)
        for mine, theirs in pairs:
            if hasattr(mine, "ds_tensor"):
                mine.ds_tensor.lerp_(theirs.ds_tensor.to(mine.ds_tensor.dtype), 1 - decay)
            else:
                mine.lerp_(theirs.to(mine.dtype), 1 - decay)
        if kept:
            kept[0].all_gather(kept)
        for buffer, moved in zip(self.module.buffers(), student.buffers(), strict=True):
            buffer.copy_(moved)
