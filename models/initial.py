"""Initial weights that depend on the run's seed and the module's name only."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions

from millrace.core.errors import UserError


def module_seed(seed: int, name: str) -> int:
    """63 bits from the run's seed and a module's qualified name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Fill `model` with its own `_init_weights`, module by module, children before parents.

    The generator is seeded with (`seed`, module name) before each module, on CPU and in fp32 whatever the
    model's device and dtype, so every ZeRO stage, precision and world size starts from equal weights.
    Partitioned modules (ZeRO stage 3) are gathered one at a time and drawn by rank 0; a tied weight is drawn
    once, by its first module. Parents come last because some families (GPT-2, nanochat) redraw their
    children's output projections.

    Raises:
        UserError: the architecture leaves a parameter uninitialised (NaN; see `bridge._empty_is_nan`), by
        name.
    """
    drawn: dict[int, str] = {}
    with guard_torch_init_functions(), torch.random.fork_rng(devices=[]):
        for name, module, owner in _modules(model, model, ""):
            touched = _touched(module)
            # Tied: what another branch has drawn already is flagged, and transformers' functions leave it
            # alone.
            tied = [p for p in touched if id(p) in drawn and not _inside(drawn[id(p)], name)]
            with whole(touched), _flagged(tied), _fp32_on_cpu(touched):
                torch.manual_seed(module_seed(seed, name))
                owner._init_weights(module)
            for parameter in module.parameters(recurse=False):
                drawn.setdefault(id(parameter), name)
    for name, parameter in model.named_parameters():
        if getattr(parameter, "ds_tensor", parameter).isnan().any():
            raise UserError(
                f"model.kind = '{model.config.model_type}' leaves '{name}' uninitialised in the installed "
                "transformers; start from a folder (model.init) or choose another kind"
            )


@torch.no_grad()
def clear_padding(model: nn.Module) -> None:
    """Set to 0 what pads the last ranks' partitions (ZeRO stage 3): NaN there would pass for a forgotten weight."""
    for parameter in model.parameters():
        if hasattr(parameter, "ds_tensor"):
            ours: Any = parameter
            rank, part = torch.distributed.get_rank(ours.ds_process_group), ours.ds_tensor
            part[max(0, ours.ds_numel - rank * part.numel()) :].zero_()


def _modules(module: nn.Module, owner: PreTrainedModel, name: str) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Children before parents, each with the (sub-)model whose `_init_weights` applies to it."""
    if isinstance(module, PreTrainedModel):
        owner = module
    for key, child in module.named_children():
        yield from _modules(child, owner, f"{name}.{key}" if name else key)
    yield name, module, owner


def _touched(module: nn.Module) -> list[nn.Parameter]:
    """What `_init_weights(module)` may write: its own parameters and its direct children's.

    Where a child has none of its own (patches of `vit_mae`, whose parent draws them), its children's.
    """
    found = {id(p): p for p in module.parameters(recurse=False)}
    for child in module.children():
        if not isinstance(child, PreTrainedModel):
            own = list(child.parameters(recurse=False))
            parts = () if own or isinstance(child, nn.ModuleList) else child.children()
            own += [p for part in parts for p in part.parameters(recurse=False)]
            found |= {id(p): p for p in own}
    return list(found.values())


def _inside(name: str, parent: str) -> bool:
    return parent == "" or name == parent or name.startswith(parent + ".")


@contextlib.contextmanager
def whole(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gather partitioned parameters; what rank 0 writes is sent to all on leaving."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield


@contextlib.contextmanager
def _flagged(parameters: list[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter in parameters:
            del parameter._is_hf_initialized  # type: ignore[attr-defined]


@contextlib.contextmanager
def _fp32_on_cpu(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let drawing happen in fp32 on CPU: other devices and dtypes draw other numbers."""
    moved = [(p, p.data) for p in parameters if p.device.type != "cpu" or p.dtype != torch.float32]
    for parameter, data in moved:
        parameter.data = data.to("cpu", torch.float32)
    try:
        yield
    finally:
        for parameter, data in moved:
            data.copy_(parameter.data)
            parameter.data = data
