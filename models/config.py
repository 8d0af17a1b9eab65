"""The `[model]` section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from millrace.core.config import option


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What is trained, and from which weights."""

    kind: str = option("qwen3", "architecture: any causal language model of transformers (its model_type)")
    depth: int | None = option(None, "layers; sets every other size too (width = 64 x depth), config keys win")
    init: str = option("random", "'random', or a Hugging Face folder or hub name to start from (it sets kind)")
    config: dict[str, Any] = option({}, "keys of the transformers configuration class, passed through")
    attention: str = option("auto", "'auto', or 'documents', 'sdpa', 'eager' or another name known to transformers")

    def __post_init__(self) -> None:
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"model.depth = {self.depth}: a model has at least one layer")
        if self.depth is not None and self.init != "random":
            raise ValueError(
                f"model.depth = {self.depth} with model.init = '{self.init}': the folder already has its sizes; "
                "leave model.depth out"
            )
