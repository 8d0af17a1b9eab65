"""Calling an engine's module without its engine: for a gradient with respect to what it is given, not its weights.

The textbook way, one engine's loss through another engine's forward, is wrong in silence at ZeRO 1 and fails at the
other stages: hooks of the other engine count the pass as one of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

Weights = dict[str, torch.Tensor]


class Twin:
    """A module of the same shape without hooks or weights; it is lent those of the engine's module."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        """`build` makes a module like the engine's."""
        with torch.device("meta"):
            self._module = build().requires_grad_(False)

    def __call__(self, weights: Weights, *arguments: Any) -> Any:
        """The module's forward with `weights`."""
        return functional_call(self._module, weights, arguments)


def weights_of(module: nn.Module) -> Weights:
    """Parameters and buffers of an engine's module, whole and detached, until its next step; call it on every rank."""
    import deepspeed

    parameters = dict(module.named_parameters())
    partitioned = any(hasattr(param, "ds_id") for param in parameters.values())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=partitioned):
        found = {name: p.detach().clone() if partitioned else p.detach() for name, p in parameters.items()}
    return found | {name: buffer.detach() for name, buffer in module.named_buffers()}
