"""What an objective of fine-tuning is made of. A new one: one file with such a class, one line in each table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from millrace.finetune.config import FinetuneConfig
from millrace.finetune.examples import Example, Record


@dataclass(frozen=True)
class Build:
    """Where a model is built from: a Hugging Face folder, and DeepSpeed's configuration at ZeRO stage 3."""

    folder: str
    zero3: dict[str, Any] | None = None


class Task(Protocol):
    """The parts of a run that depend on the objective; made with the whole configuration and the source's tokenizer."""

    peft_type: str  # task type of peft
    per_example: bool  # one label for an example, not one for each token
    heads: list[str]  # modules, by name, that adapters train whole

    def __init__(self, config: FinetuneConfig, tokenizer: Any) -> None: ...

    def encode(self, train: Iterable[Record], heldout: Iterable[Record]) -> tuple[list[Example], list[Example]]:
        """Both sets of examples as tokens."""
        ...

    def packs(self, kind: str) -> bool:
        """Whether several examples of a model of this `model_type` may share a row."""
        ...

    def model(self, build: Build) -> Any:
        """The model of transformers, with its first weights."""
        ...

    def objective(self, model: Any) -> nn.Module:
        """What the engine wraps: `figures`, `inputs(micro, device)`, a forward that returns (summed loss, figures)."""
        ...

    def sampler(self, model: Any) -> Callable[[], list[dict[str, Any]]] | None:
        """Continues eval.prompts, or None where there is nothing to continue."""
        ...

    def load(self, folder: Path, config: Any) -> Any:
        """The model in `folder` on one process, fp32, with the transformers configuration `config`."""
        ...
