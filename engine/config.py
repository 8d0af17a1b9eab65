"""Engine and checkpoint sections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from millrace.core.config import option
from millrace.core.errors import UserError
from millrace.core.units import Duration
from millrace.data.stores.folder import check_url


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How training is sharded and in which precision it runs."""

    zero_stage: Literal[0, 1, 2, 3] = option(2, "DeepSpeed ZeRO stage: 0 none, 1 moments, 2 gradients, 3 weights")
    precision: Literal["auto", "fp32", "bf16", "autocast"] = option(
        "auto", "auto: bf16 where the hardware is fast at it; autocast: products in bf16, weights in fp32"
    )
    offload_optimizer: bool = option(False, "keep fp32 masters and moments in CPU memory (ZeRO 1-3)")
    offload_params: bool = option(False, "keep partitioned weights in CPU memory (ZeRO 3)")
    activation_checkpointing: bool = option(False, "recompute each block's activations in the backward pass")
    compile: bool = option(False, "torch.compile the objective's forward")
    persistence_threshold: int | None = option(
        None, "ZeRO 3: parameters below this many elements stay whole on every rank (DeepSpeed's default: 100000)"
    )
    deepspeed_config: str | None = option(
        None, "your own DeepSpeed JSON; its keys win, except those that millrace must set"
    )

    def __post_init__(self) -> None:
        if self.offload_params and self.zero_stage != 3:
            raise UserError(f"engine.offload_params needs engine.zero_stage = 3, not {self.zero_stage}")
        if self.offload_optimizer and self.zero_stage == 0:
            raise UserError("engine.offload_optimizer needs engine.zero_stage 1, 2 or 3, not 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every: Duration | None = option(Duration(500, "steps"), "between checkpoints: steps or time; one more at the end")
    between: Duration | None = option(None, "steps or time between further ones, each of which replaces the one before")
    background: bool = option(True, "write while training goes on; a step then waits for one copy in memory only")
    keep: int = option(2, "newest checkpoints to keep; 0 keeps all")
    keep_every: int = option(0, "steps whose multiples are kept for ever, where there is a checkpoint; 0: none")
    keep_best: int = option(0, "checkpoints with the lowest held-out loss to keep, of those where it was measured")
    upload: str = option("", "also into an object store: s3://BUCKET/PREFIX, gs://, az:// or file:///PATH; empty: no")

    def __post_init__(self) -> None:
        for key in ("every", "between"):
            value = getattr(self, key)
            if value is not None and (value.unit not in ("steps", "s") or value.value < 1):
                raise UserError(f"checkpoint.{key} = '{value}': give steps or a time, such as '500 steps' or '10 min'")
        if self.upload and (why := check_url(self.upload)):
            raise UserError(f"checkpoint.upload = '{self.upload}': {why}")
        for key in ("keep", "keep_every", "keep_best"):
            if getattr(self, key) < 0:
                raise UserError(f"checkpoint.{key} = {getattr(self, key)}: give 0 or more")
