"""The whole configuration of a fine-tuning run, and what is derived from it and the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from millrace.core.config import option, section, to_dict, variant
from millrace.core.errors import UserError
from millrace.engine.config import CheckpointConfig, EngineConfig
from millrace.engine.guard import GuardConfig
from millrace.engine.watchdog.config import WatchdogConfig
from millrace.finetune import CONFIGS as OBJECTIVES
from millrace.finetune.sections import (
    OPTIMIZERS,
    SCHEDULES,
    ExamplesConfig,
    FinetuneTrain,
    LoraConfig,
    SourceModelConfig,
)
from millrace.pretrain.config import EvalSection, RunSection
from millrace.pretrain.track_config import TrackConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """A fine-tuning run."""

    source: str = option("", "a run directory, one of its checkpoints/step-N, or a Hugging Face folder or hub name")
    run: RunSection = section(RunSection, "which run this is")
    data: ExamplesConfig = section(ExamplesConfig, "the examples")
    model: SourceModelConfig = section(SourceModelConfig, "changes to the source's model")
    lora: LoraConfig = section(LoraConfig, "low-rank adapters")
    objective: Any = variant(OBJECTIVES, "instruct", "what the loss is")
    optim: Any = variant(OPTIMIZERS, "adamw", "the optimiser")
    schedule: Any = variant(SCHEDULES, "cosine", "the learning rate over time")
    train: FinetuneTrain = section(FinetuneTrain, "how much is trained")
    engine: EngineConfig = section(EngineConfig, "sharding and precision")
    guard: GuardConfig = section(GuardConfig, "which steps are not taken")
    watchdog: WatchdogConfig = section(WatchdogConfig, "how long a part of a step may take before the run is ended")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "when checkpoints are written")
    eval: EvalSection = section(EvalSection, "evaluation in the loop")
    track: TrackConfig = section(TrackConfig, "where figures go")


def check(config: FinetuneConfig) -> None:
    """Cross-section checks that need neither files nor ranks.

    Raises:
        UserError: source or examples are not given.
    """
    if not config.source:
        raise UserError("source is not set; give a run directory, such as source=runs/tiny, or a Hugging Face folder")
    if not config.data.train:
        raise UserError("data.train is not set; give a JSONL or Parquet file, such as data.train=answers.jsonl")


def fingerprint(config: FinetuneConfig, examples: str) -> dict[str, Any]:
    """What may not change between two starts of one run; `examples` is the hash of the training examples."""
    whole = to_dict(config)
    return {
        "source": config.source,
        "examples": examples,
        "seed": config.run.seed,
        "model": whole["model"]["config"],
        "lora": whole["lora"],
        "objective": whole["objective"],
        "batch": config.train.batch,
        "sequence_length": config.data.sequence_length,
        "pack": config.data.pack,
    }
