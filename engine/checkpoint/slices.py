"""The flat slices of masters and moments that this rank holds, one adapter per optimiser wrapper of DeepSpeed.

Every adapter speaks of a parameter in its own flat coordinates, [0, numel), whatever DeepSpeed padded or concatenated
around it. That is what lets any ZeRO stage and world size load what another wrote.

| wrapper                        | stages     | masters live in                                |
|--------------------------------|------------|------------------------------------------------|
| a plain torch optimiser        | 0, fp32    | the parameters                                 |
| FP16_UnfusedOptimizer          | 0, bf16    | `fp32_groups`, whole on every rank             |
| DeepSpeedZeroOptimizer         | 1, 2       | `param._hp_mapping`, a part of a flat group    |
| BF16_Optimizer                 | 1, bf16    | `param._hp_mapping`, a part of a flat group    |
| DeepSpeedZeroOptimizer_Stage3  | 3          | `fp32_partitioned_groups_flat`                 |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

MASTER = "master"


@dataclass(frozen=True)
class Held:
    """Elements [start, start + length) of a parameter, as writable 1-D views by state ("master", "exp_avg", …)."""

    name: str
    start: int
    views: dict[str, torch.Tensor]

    @property
    def length(self) -> int:
        """Number of elements."""
        return self.views[MASTER].numel()

    def narrow(self, start: int, stop: int) -> Held | None:
        """The part of this that lies in [start, stop) of the parameter, or None."""
        low, high = max(start, self.start), min(stop, self.start + self.length)
        if low >= high:
            return None
        views = {k: v.narrow(0, low - self.start, high - low) for k, v in self.views.items()}
        return Held(self.name, low, views)


class Adapter:
    """What a checkpoint needs of an engine's optimiser.

    `held()` yields what this rank keeps, possibly whole parameters; `owned()` yields what this rank writes, so that
    all ranks together write every element once.
    """

    replicated = False  # every rank holds everything

    def __init__(self, ds: Any) -> None:
        self.ds = ds
        self.wrapper = ds.optimizer
        self.inner = getattr(self.wrapper, "optimizer", self.wrapper)
        self.named = [(n, p) for n, p in ds.module.named_parameters() if p.requires_grad]
        self.rank = torch.distributed.get_rank()
        self.world = torch.distributed.get_world_size()
        self.zero_stage = int(ds.zero_optimization_stage())

    def modules(self) -> list[tuple[str, torch.nn.Module]]:
        """The module, and what stands before its tensors' names."""
        return [("", self.ds.module)]

    def masters(self) -> list[torch.Tensor]:
        """The tensors that the inner optimiser steps, keys of its state."""
        raise NotImplementedError

    def held(self) -> Iterator[Held]:
        """What this rank keeps."""
        raise NotImplementedError

    def push(self) -> None:
        """Copy the masters into the weights that the forward pass uses."""
        raise NotImplementedError

    def discard(self) -> None:
        """Forget the gradients since the last step: bit for bit as if their batch had never been seen.

        Merely not stepping would leave them to the next step. Done as DeepSpeed does it after an overflow.
        """
        self.wrapper.zero_grad(set_to_none=True)

    def owned(self) -> Iterator[Held]:
        """What this rank writes."""
        if not self.replicated:
            yield from self.held()
            return
        for item in self.held():
            share = -(-item.length // self.world)
            part = item.narrow(self.rank * share, (self.rank + 1) * share)
            if part is not None:
                yield part

    def state_tensors(self) -> list[str]:
        """Names of the optimiser's states that are as large as their master ("exp_avg", "exp_avg_sq")."""
        for master in self.masters():
            state = self.inner.state.get(master, {})
            return [k for k, v in state.items() if torch.is_tensor(v) and v.shape == master.shape]
        return []

    def allocate(self) -> None:
        """Create AdamW's moments, which torch would only create in the first step, so that they can be loaded."""
        for master in self.masters():
            state = self.inner.state[master]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=self._step_device(master))
                state["exp_avg"] = torch.zeros_like(master)
                state["exp_avg_sq"] = torch.zeros_like(master)

    def _step_device(self, master: torch.Tensor) -> torch.device:
        # torch's fused AdamW keeps the step count beside the parameter, the others on the CPU.
        return master.device if self.inner.defaults.get("fused") else torch.device("cpu")

    def step_count(self) -> int:
        """Optimiser steps taken, 0 before the first."""
        for master in self.masters():
            if "step" in self.inner.state.get(master, {}):
                return int(self.inner.state[master]["step"])
        return 0

    def set_step_count(self, count: int) -> None:
        """Restore Adam's step, which its bias correction depends on."""
        for master in self.masters():
            step = self.inner.state[master]["step"]
            if torch.is_tensor(step):
                step.fill_(count)
            else:
                self.inner.state[master]["step"] = count

    def _views(self, master: torch.Tensor, start: int, length: int) -> dict[str, torch.Tensor]:
        state = self.inner.state.get(master, {})
        whole = {MASTER: master, **{k: state[k] for k in self.state_tensors() if k in state}}
        return {k: v.detach().view(-1).narrow(0, start, length) for k, v in whole.items()}


class PlainAdapter(Adapter):
    """Stage 0 in fp32: the optimiser steps the parameters themselves."""

    replicated = True

    def masters(self) -> list[torch.Tensor]:
        return [p for _, p in self.named]

    def held(self) -> Iterator[Held]:
        for name, param in self.named:
            yield Held(name, 0, self._views(param, 0, param.numel()))

    def push(self) -> None:
        """The masters are the weights."""


class UnfusedAdapter(Adapter):
    """Stage 0 in bf16: whole fp32 masters beside the bf16 weights."""

    replicated = True

    def _pairs(self) -> dict[int, torch.Tensor]:
        pairs = zip(self.wrapper.fp16_groups, self.wrapper.fp32_groups, strict=True)
        return {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}

    def masters(self) -> list[torch.Tensor]:
        return [master for group in self.wrapper.fp32_groups for master in group]

    def held(self) -> Iterator[Held]:
        pairs = self._pairs()
        for name, param in self.named:
            master = pairs[id(param)]
            yield Held(name, 0, self._views(master, 0, master.numel()))

    def push(self) -> None:
        pairs = self._pairs()
        with torch.no_grad():
            for _, param in self.named:
                param.copy_(pairs[id(param)])


class FlatAdapter(Adapter):
    """Stages 1 and 2: each rank holds one part of every flat group; a parameter may span two ranks."""

    def masters(self) -> list[torch.Tensor]:
        name = "fp32_groups_flat_partition"
        if hasattr(self.wrapper, name):  # BF16_Optimizer
            return list(getattr(self.wrapper, name))
        return list(self.wrapper.single_partition_of_fp32_groups)

    def held(self) -> Iterator[Held]:
        masters = self.masters()
        for name, param in self.named:
            mapping = param._hp_mapping
            if mapping is not None:
                at = mapping.hp_fragment_address
                views = self._views(masters[mapping.param_group_index], at.start, at.numel)
                yield Held(name, mapping.lp_fragment_address.start, views)

    def push(self) -> None:
        with torch.no_grad():
            self.wrapper.update_lp_params()

    def discard(self) -> None:
        wrapper = self.wrapper
        super().discard()
        if not hasattr(wrapper, "averaged_gradients"):  # BF16_Optimizer: its `zero_grad` is enough
            return
        wrapper.micro_step_id = -1
        wrapper._wait_for_offload_copies()
        wrapper._release_preflattened_grad_buffers()
        if wrapper.cpu_offload:
            wrapper._offload_accumulated_param_ids = set()
            wrapper.reset_cpu_buffers()
        for group in wrapper.averaged_gradients:
            wrapper.averaged_gradients[group] = wrapper.all_grad_tensors[group] = None


class PartitionedAdapter(Adapter):
    """Stage 3: rank r holds elements [r·n, (r+1)·n) of every parameter, padded to n·world."""

    def masters(self) -> list[torch.Tensor]:
        return list(self.wrapper.fp32_partitioned_groups_flat)

    def held(self) -> Iterator[Held]:
        for name, param in self.named:
            group, offset, padded = self.wrapper.grad_position[self.wrapper.get_param_id(param)]
            start = self.rank * padded
            length = max(0, min(padded, param.ds_numel - start))
            if length:
                master = self.wrapper.fp32_partitioned_groups_flat[group]
                yield Held(name, start, self._views(master, offset, length))

    def push(self) -> None:
        persistent = self.wrapper.persistent_parameters
        # Parameters below the persistence threshold are also kept whole: without gathering them anew, the next
        # forward would use stale weights while the masters already look right.
        if persistent:
            persistent[0].partition(persistent)
        with torch.no_grad():
            for _, param in self.named:
                group, offset, padded = self.wrapper.grad_position[self.wrapper.get_param_id(param)]
                master = self.wrapper.fp32_partitioned_groups_flat[group]
                param.ds_tensor.data.copy_(master.narrow(0, offset, padded))
        if persistent:
            persistent[0].all_gather(persistent)

    def discard(self) -> None:
        self.wrapper._pre_step()
        self.wrapper._overflow_clean_up(1.0)


def adapter(ds: Any) -> Adapter:
    """The adapter for a DeepSpeed engine's optimiser wrapper.

    Raises:
        NotImplementedError: a wrapper this module does not know; better no checkpoint than a wrong one.
    """
    kinds = {
        "FP16_UnfusedOptimizer": UnfusedAdapter,
        "BF16_Optimizer": FlatAdapter,
        "DeepSpeedZeroOptimizer": FlatAdapter,
        "DeepSpeedZeroOptimizer_Stage3": PartitionedAdapter,
    }
    name = type(ds.optimizer).__name__
    if name in kinds:
        return kinds[name](ds)
    if isinstance(ds.optimizer, torch.optim.Optimizer):
        return PlainAdapter(ds)
    raise NotImplementedError(f"checkpoints do not know DeepSpeed's optimiser wrapper {name}")
