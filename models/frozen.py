"""Modules that are only used: their weights are buffers.

ZeRO 3 partitions frozen parameters, and DeepSpeed turns them into the precision of the training; buffers stay whole and
as they are, at every stage, so that any rank may use them at any time, and checkpoints hold them to the bit.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def frozen(module: AnyModule) -> AnyModule:
    """The module itself, with buffers in the place of its parameters."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            del owner._parameters[name]
            owner.register_buffer(name, parameter.detach())
    return module.eval()
