"""Optimisers. Weight decay acts on matrices only: norms' gains and biases have no scale to decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from millrace.core.config import option
from millrace.core.errors import UserError

if TYPE_CHECKING:
    import torch

OPTIMIZERS = {"adamw": "millrace.pretrain.optim:AdamW"}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101), torch's fused one."""

    kind: Literal["adamw"] = option("adamw", "which optimiser")
    lr: float = option(1e-3, "peak learning rate")
    betas: list[float] = option([0.9, 0.95], "decay rates of the two moments")
    eps: float = option(1e-8, "added to the root of the second moment")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices")
    clip: float = option(1.0, "largest norm of the global gradient; 0 for no clipping")

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"optim.lr = {self.lr}: must be positive")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise UserError(f"optim.betas = {self.betas}: give two numbers in [0, 1)")
        if self.clip < 0 or self.weight_decay < 0:
            raise UserError("optim.clip and optim.weight_decay must not be negative")

    def build(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        """The optimiser over the module's trainable parameters, in two groups: matrices and the rest."""
        import torch

        groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
        for param in module.parameters():
            if param.requires_grad:
                # Under ZeRO 3 a partitioned parameter's own shape is empty; DeepSpeed keeps the true one.
                groups[len(getattr(param, "ds_shape", param.shape)) >= 2].append(param)
        made = [
            {"params": groups[matrix], "weight_decay": self.weight_decay if matrix else 0.0}
            for matrix in (True, False)
            if groups[matrix]
        ]
        return torch.optim.AdamW(made, lr=self.lr, betas=(self.betas[0], self.betas[1]), eps=self.eps, fused=True)
