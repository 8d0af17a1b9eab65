"""Sections of a fine-tuning configuration that pretraining has not, or has with other defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from millrace.core.config import option
from millrace.core.errors import UserError
from millrace.core.units import Duration
from millrace.pretrain import optim, schedule
from millrace.pretrain.config import TrainSection
from millrace.pretrain.objectives.config import CausalLMConfig

OPTIMIZERS = {"adamw": "millrace.finetune.sections:AdamW"}
SCHEDULES = {
    "cosine": "millrace.finetune.sections:Cosine",
    "wsd": "millrace.finetune.sections:WarmupStableDecay",
    "constant": "millrace.finetune.sections:Constant",
}
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExamplesConfig:
    """What is read, and how it is cut into rows. All examples are held in memory as tokens."""

    train: str = option("", "examples: a JSONL or Parquet file, a folder or glob of them, or a `datasets` NAME[:SPLIT]")
    heldout: str | None = option(None, "held-out examples, given in the same ways")
    heldout_share: float = option(0.05, "share of data.train that is held out where data.heldout is not given")
    columns: dict[str, str] = option(
        {}, "your names of the fields prompt, response, messages, text, label: {prompt = 'instruction'}"
    )
    tokenizer: str | None = option(None, "tokenizer folder or hub name (default: the source's)")
    sequence_length: int = option(512, "tokens in a row; longer examples lose the left part of their prompt")
    pack: bool = option(True, "several examples in a row, where objective and architecture allow it")

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise UserError(f"data.sequence_length = {self.sequence_length}: must be at least 2")
        if not 0 <= self.heldout_share < 1:
            raise UserError(f"data.heldout_share = {self.heldout_share}: give a share of at least 0 and below 1")
        if odd := self.columns.keys() - {"prompt", "response", "messages", "text", "label"}:
            raise UserError(f"data.columns has '{min(odd)}'; the fields are prompt, response, messages, text and label")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceModelConfig:
    """Changes to the source's model."""

    config: dict[str, Any] = option({}, "keys of its transformers configuration to change, passed through")
    attention: str = option("auto", "'auto', or 'documents', 'sdpa', 'eager' or another name known to transformers")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (https://arxiv.org/abs/2106.09685); off at r = 0."""

    r: int = option(0, "rank of the adapters; 0 trains every weight")
    alpha: int | None = option(None, "updates are scaled by alpha / r (default: 2 r)")
    dropout: float = option(0.0, "must be 0: a resumed run repeats to the bit only without dropout")
    target_modules: list[str] | str = option(
        ALL_LINEAR, "'all-linear' (every linear layer but the head), or names such as ['q_proj', 'v_proj']"
    )

    def __post_init__(self) -> None:
        if self.r < 0:
            raise UserError(f"lora.r = {self.r}: give a rank of at least 1, or 0 for no adapters")
        if self.dropout:
            raise UserError(f"lora.dropout = {self.dropout}: must be 0, so that a resumed run repeats exactly")
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            raise UserError(f"lora.target_modules = '{self.target_modules}': give 'all-linear' or a list of names")


@dataclass(frozen=True, kw_only=True, slots=True)
class InstructConfig(CausalLMConfig):
    """Predict the assistant's tokens; the prompt is read, not learnt."""

    kind: Literal["instruct"] = option("instruct", "which objective")  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyConfig:
    """One label for each text."""

    kind: Literal["classify"] = option("classify", "which objective")
    labels: list[str] = option([], "labels to learn; examples with others are left out (default: all that occur)")

    def __post_init__(self) -> None:
        if len(set(self.labels)) != len(self.labels) or len(self.labels) == 1:
            raise UserError(f"objective.labels = {self.labels}: give two or more different labels, or none for all")


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneTrain(TrainSection):
    """How much is trained, and on how much at once."""

    duration: Duration = option(Duration(1, "epochs"), "length: epochs, steps, tokens (targets) or a time")
    batch: int = option(16, "rows of a global step, whatever the number of ranks")

    def __post_init__(self) -> None:
        if self.batch < 1 or self.micro_batch < 1:
            raise UserError("train.batch and train.micro_batch must be at least 1")
        if self.duration.value < 1:
            raise UserError(f"train.duration = '{self.duration}': give epochs, steps, tokens or a time")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW(optim.AdamW):
    """AdamW with the defaults of fine-tuning."""

    lr: float = option(1e-4, "peak learning rate; about 1e-4 to 1e-3 for adapters, 1e-5 to 1e-4 for all weights")
    betas: list[float] = option([0.9, 0.999], "decay rates of the two moments")
    weight_decay: float = option(0.0, "decoupled weight decay of matrices")


_WARMUP = Duration(10, "steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cosine(schedule.Cosine):
    """Warm-up and half a cosine."""

    warmup: Duration = option(_WARMUP, "linear warm-up: steps, tokens or a time")


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupStableDecay(schedule.WarmupStableDecay):
    """Warm-up, a plateau and a decay."""

    warmup: Duration = option(_WARMUP, "linear warm-up: steps, tokens or a time")


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant(schedule.Constant):
    """Warm-up, then constant."""

    warmup: Duration = option(_WARMUP, "linear warm-up: steps, tokens or a time")
