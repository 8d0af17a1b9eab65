"""A module inside a DeepSpeed engine, driven directly: forward, backward, one optimiser step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from millrace.engine.checkpoint.slices import Adapter, PlainAdapter, adapter
from millrace.engine.distributed import World
from millrace.engine.zero import bucket_elements, fit_buckets


class Engine:
    """A module, its DeepSpeed engine and the adapter that checkpoints need.

    `accelerator.backward` is not used: it steps by itself and binds only the first engine.
    """

    def __init__(
        self, world: World, module: torch.nn.Module, optimizer: torch.optim.Optimizer, clip: float, factor: float = 1.0
    ) -> None:
        """`factor` times the run's learning rate is this engine's."""
        self.world = world
        self.clip, self._factor = clip, factor
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)
        one_dtype(module)
        fit_buckets(world.accelerator.state.deepspeed_plugin.deepspeed_config, trained)
        self.ds, _ = world.accelerator.prepare(module, optimizer)
        self.module = self.ds.module
        self.adapter: Adapter = adapter(self.ds)
        # Replicated gradients are reduced here: DeepSpeed takes one bucket for all of them, and copies them into it and
        # back even to reduce them with nobody (4% of a step).
        self._bucket = bucket_elements(trained)
        self.ds.enable_backward_allreduce = not self.adapter.replicated
        self._norm: torch.Tensor | None = None

    def compile(self) -> None:
        """Compile the module's forward."""
        self.ds.compile()

    def forward(self, micro: Any) -> Any:
        """What the module's forward gives for its `inputs` from one micro-batch, (summed loss, figures) for most."""
        return self.ds(**self.module.inputs(micro, self.world.device))

    def backward(self, loss_sum: torch.Tensor, tokens: float, *, last: bool) -> None:
        """Accumulate the gradient of `loss_sum / tokens`, with `tokens` the targets of the global batch.

        DeepSpeed averages over ranks, so the loss is scaled up by the world size; `last` is the micro-batch after
        which the optimiser steps.
        """
        self.ds.set_gradient_accumulation_boundary(last)
        self.ds.backward(loss_sum * (self.world.size / tokens), scale_wrt_gas=False)
        if last and self.adapter.replicated and self.world.size > 1:
            self.ds.allreduce_gradients(self._bucket)

    def gradient_square(self) -> torch.Tensor:
        """This rank's share of the gradient's squared L2 norm, a float64 scalar; the ranks' sum is that of the whole.

        Call it on every rank between the last backward and `step` or `discard`.
        """
        zero = torch.zeros((), dtype=torch.float64, device=self.world.device)
        if isinstance(self.adapter, PlainAdapter):
            # DeepSpeed leaves these gradients as they are: every rank has them all, averaged, and clips by this.
            self._norm = torch.nn.utils.get_total_norm([p.grad for _, p in self.adapter.named if p.grad is not None])
            return self._norm.double() ** 2 if self.world.main else zero
        norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for _, part in self._gradients()]
        return torch.stack(norms).double().square().sum().to(zero.device) if norms else zero

    def discard(self) -> None:
        """Forget the gradients since the last step, on every rank: to the bit as if their batch had never been seen."""
        self.adapter.discard()

    def step(self, lr: float) -> None:
        """One optimiser step at learning rate `lr`, after `gradient_square`."""
        for group in self.adapter.inner.param_groups:
            group["lr"] = lr * self._factor
        if isinstance(self.adapter, PlainAdapter) and self.clip:
            assert self._norm is not None, "take gradient_square before the step"
            params = [p for _, p in self.adapter.named if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(params, self.clip, self._norm)
        self.ds.step()

    def norms(self, *, gradients: bool) -> dict[str, float]:
        """L2 norm by layer, of the weights or (between the last backward and `step`) of the gradients.

        A layer is what stands before its parameters' leaf modules, such as `layers.3`; on every rank.
        """
        source = self._gradients() if gradients else self._weights()
        squares = {layer_of(name): 0.0 for name, _ in self.adapter.named}
        for name, part in source:
            squares[layer_of(name)] += float(part.float().square().sum())
        names = sorted(squares)
        totals = self.world.sum(*(squares[n] for n in names))
        return {n: t**0.5 for n, t in zip(names, totals, strict=True)}

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for held in self.adapter.owned():
            yield held.name, held.views["master"]

    def _gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's share of every gradient; replicated ones are counted on rank 0 only."""
        from deepspeed.utils import safe_get_local_grad

        for name, param in self.adapter.named:
            if hasattr(param, "ds_id"):
                yield name, safe_get_local_grad(param)
            elif self.adapter.replicated:
                if self.world.main and param.grad is not None:
                    yield name, param.grad
            elif param._hp_mapping is not None:
                part = param._hp_mapping.get_lp_grad_fragment(param._index_in_param_group)
                if part.shape == param.shape:  # BF16_Optimizer keeps the whole accumulation buffer
                    at = param._hp_mapping.lp_fragment_address
                    part = part.reshape(-1).narrow(0, at.start, at.numel)
                yield name, part


def one_dtype(module: torch.nn.Module) -> None:
    """Keep parameters that were made whole in the dtype of those that ZeRO 3 partitioned as they were built.

    DeepSpeed casts a module only where no part of it was, and then refuses parts of several dtypes.
    """
    made: list[Any] = list(module.parameters())
    kinds = {p.ds_tensor.dtype for p in made if hasattr(p, "ds_tensor")}
    for parameter in made:
        if len(kinds) == 1 and not hasattr(parameter, "ds_tensor"):
            parameter.data = parameter.data.to(*kinds)


def layer_of(name: str) -> str:
    """`model.model.layers.3.mlp.up_proj.weight` → `layers.3`; outside blocks the owning module's name."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[place - 1 : place + 1])
    return parts[-2] if len(parts) > 1 else name
