"""Sections of the objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from millrace.core.config import option
from millrace.core.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalLMConfig:
    """Predict every next token of every document."""

    kind: Literal["causal_lm"] = option("causal_lm", "which objective")
    z_loss: float = option(0.0, "weight of the squared log-partition (PaLM used 1e-4), which keeps logits small")
    chunk: int = option(0, "tokens whose logits are held at once; 0: 2,048 on a GPU, 512 on a CPU (its cache)")

    def __post_init__(self) -> None:
        if self.z_loss < 0 or self.chunk < 0:
            raise UserError(f"[objective] needs z_loss >= 0 and chunk >= 0, not {self.z_loss} and {self.chunk}")
