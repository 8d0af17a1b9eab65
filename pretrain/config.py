"""The whole configuration of a pretraining run, and what is derived from it and the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from millrace.core.config import option, section, to_dict, variant
from millrace.core.errors import UserError
from millrace.core.units import Duration
from millrace.data.config import DataConfig
from millrace.engine.config import CheckpointConfig, EngineConfig
from millrace.engine.guard import GuardConfig
from millrace.engine.watchdog.config import WatchdogConfig
from millrace.models.config import ModelConfig
from millrace.pretrain.objectives import CONFIGS as OBJECTIVES
from millrace.pretrain.optim import OPTIMIZERS
from millrace.pretrain.schedule import SCHEDULES
from millrace.pretrain.track_config import TrackConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSection:
    """Which run this is."""

    name: str = option("run", "names the run directory: run.dir/run.name")
    dir: str = option("runs", "folder of run directories")
    seed: int = option(0, "of the initial weights and the order of samples")
    processes: int = option(0, "ranks that `millrace pretrain` starts by itself; 0: one per GPU, one without GPUs")
    sample_ids: bool = option(False, "list every step's samples in the ledger, not only their hash")

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name in (".", ".."):
            raise UserError(f"run.name = '{self.name}': give a plain folder name")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection:
    """How much is trained, and on how much at once."""

    duration: Duration = option(Duration(1000, "steps"), "length: steps, tokens (targets) or a time")
    batch: int = option(32, "rows of data.sequence_length in a global step, whatever the number of ranks")
    micro_batch: int = option(4, "rows that a rank computes at once")

    def __post_init__(self) -> None:
        if self.batch < 1 or self.micro_batch < 1:
            raise UserError("train.batch and train.micro_batch must be at least 1")
        if self.duration.unit == "epochs" or self.duration.value < 1:
            raise UserError(f"train.duration = '{self.duration}': give steps, tokens or a time")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSection:
    """Held-out evaluation and samples in the loop."""

    every: Duration | None = option(Duration(250, "steps"), "between evaluations: steps or a time; one more at the end")
    rows: int = option(256, "rows of held-out text in the loop; 0 for all of it")
    prompts: list[str] = option([], "continued at every evaluation")
    sample_tokens: int = option(48, "tokens generated for each prompt")

    def __post_init__(self) -> None:
        if self.every is not None and (self.every.unit not in ("steps", "s") or self.every.value < 1):
            raise UserError(f"eval.every = '{self.every}': give steps or a time")


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """A pretraining run."""

    run: RunSection = section(RunSection, "which run this is")
    data: DataConfig = section(DataConfig, "the stream of samples")
    model: ModelConfig = section(ModelConfig, "the architecture and its first weights")
    objective: Any = variant(OBJECTIVES, "causal_lm", "what the loss is")
    optim: Any = variant(OPTIMIZERS, "adamw", "the optimiser")
    schedule: Any = variant(SCHEDULES, "wsd", "the learning rate over time")
    train: TrainSection = section(TrainSection, "how much is trained")
    engine: EngineConfig = section(EngineConfig, "sharding and precision")
    guard: GuardConfig = section(GuardConfig, "which steps are not taken")
    watchdog: WatchdogConfig = section(WatchdogConfig, "how long a part of a step may take before the run is ended")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "when checkpoints are written")
    eval: EvalSection = section(EvalSection, "evaluation in the loop")
    track: TrackConfig = section(TrackConfig, "where figures go")


@dataclass(frozen=True)
class Derived:
    """What follows from the configuration and the number of ranks."""

    accumulation: int  # micro-batches a rank computes in a step


def resolve(config: PretrainConfig, world: int) -> Derived:
    """Cross-section checks and derivation; pure.

    Raises:
        UserError: the ranks do not divide the batch.
    """
    rows = config.train.batch // config.train.micro_batch
    if config.train.batch % config.train.micro_batch or rows % world:
        fits = [w for w in range(1, rows + 1) if rows % w == 0]
        if config.train.batch % config.train.micro_batch:
            raise UserError(
                f"train.batch = {config.train.batch} is not a multiple of train.micro_batch = "
                f"{config.train.micro_batch}"
            )
        raise UserError(
            f"train.batch = {config.train.batch} rows in micro-batches of {config.train.micro_batch} cannot be "
            f"divided among {world} ranks; numbers of ranks that work: {', '.join(map(str, fits))}"
        )
    if not config.data.manifest:
        raise UserError("data.manifest is not set; make one with `millrace prepare FILES --out FOLDER`")
    return Derived(accumulation=rows // world)


def fingerprint(config: PretrainConfig, manifests: Sequence[str]) -> dict[str, Any]:
    """What may not change between two starts of one run; the rest may (stage, precision, ranks, duration, tracking)."""
    whole = to_dict(config)
    return {
        "manifests": list(manifests),
        "seed": config.run.seed,
        "model": {k: v for k, v in whole["model"].items() if k != "attention"},
        "objective": whole["objective"],
        "batch": config.train.batch,
        "sequence_length": config.data.sequence_length,
    }
