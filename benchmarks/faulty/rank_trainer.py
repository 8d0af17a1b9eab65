"""A rank of the other arm: transformers' Trainer with Accelerate and DeepSpeed, as its examples write it.

`python -m faulty.rank_trainer JOB`, a JSON object: folder (of the run), corpus, every (steps between checkpoints), jit
(save on SIGTERM), and with `order` the number of steps whose samples are listed, and nothing is trained.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import die_with_parent
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from faulty import corpus
from faulty.orders import Orders
from millrace.core.ledger import Ledger


class Rows(torch.utils.data.Dataset):
    """Row n with its number."""

    def __init__(self, folder: Path) -> None:
        self._rows = np.load(folder / "rows.npy")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = torch.from_numpy(self._rows[number].astype(np.int64))
        return {"input_ids": row, "labels": row, "sample": number}


class Recorded(Trainer):
    """Keeps the samples and the loss of the step under way."""

    orders: Orders
    dry = False

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.samples = inputs.pop("sample").tolist()
        if self.dry:
            return torch.zeros(())
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, *arguments: Any, **more: Any) -> Any:
        loss = super().compute_loss(*arguments, **more)
        if self.orders.take("nan"):
            loss = loss * float("nan")
        self.loss = float(loss.detach())
        return loss

    def _save_checkpoint(self, *arguments: Any, **more: Any) -> None:
        self.orders.take("kill in save")  # the supervisor sees it and kills
        super()._save_checkpoint(*arguments, **more)


class Log(TrainerCallback):
    """Writes starts and steps into this rank's log, in the words of millrace's ledger."""

    def __init__(self, path: Path, start: int) -> None:
        self._ledger, self._start = Ledger(path), start
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._ledger.append("start", start=self._start, resumed_from=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        seconds = time.perf_counter() - self._began
        found = {"loss": getattr(self.trainer, "loss", 0.0), "samples": self.trainer.samples}
        self._ledger.append("step", start=self._start, step=state.global_step, seconds=seconds, **found)


def deepspeed(parameters: int, ranks: int) -> dict[str, Any]:
    """Our own configuration of DeepSpeed, so that the engines are alike."""
    from millrace.engine.config import EngineConfig
    from millrace.engine.zero import deepspeed_config, fit_buckets

    made = deepspeed_config(
        EngineConfig(zero_stage=2), "fp32", micro_batch=corpus.BATCH // ranks, accumulation=1, clip=corpus.CLIP
    )
    fit_buckets(made, parameters)
    return made


def arguments(job: dict[str, Any], parameters: int) -> TrainingArguments:
    """As the documentation has it; samples are drawn by Accelerate's seedable sampler, the default."""
    ranks = int(os.environ["WORLD_SIZE"])
    return TrainingArguments(
        output_dir=job["folder"], max_steps=job.get("order") or 1_000_000, learning_rate=corpus.LEARNING_RATE,
        max_grad_norm=corpus.CLIP, per_device_train_batch_size=corpus.BATCH // ranks, lr_scheduler_type="constant",
        optim="adamw_torch_fused", adam_beta2=0.95, weight_decay=0.1, report_to=[], logging_steps=10,
        save_strategy="no" if job.get("order") else "steps", save_steps=job["every"], save_total_limit=2,
        enable_jit_checkpoint=job["jit"], disable_tqdm=True, deepspeed=deepspeed(parameters, ranks), bf16=False,
        accelerator_config={"use_configured_state": True}, remove_unused_columns=False,
    )  # fmt: skip


def main() -> None:
    from accelerate import PartialState

    from millrace.engine.ops import use_operators
    from millrace.models.bridge import build_model
    from millrace.models.config import ModelConfig

    die_with_parent()
    job, orders = json.loads(sys.argv[1]), Orders()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    use_operators()
    # Left to itself the Trainer gives Accelerate no backend beside DeepSpeed, and on a CPU every rank takes itself for
    # the only one: both would train on the same rows.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    sizes = ModelConfig(kind="qwen3", config=dict(corpus.SIZES), attention="sdpa")
    model = build_model(sizes, corpus.VOCABULARY, corpus.LENGTH, 0)
    log = Log(Path(job["folder"]) / f"log-{orders.rank}.jsonl", orders.start)
    settings = arguments(job, sum(p.numel() for p in model.parameters()))
    Recorded.orders, Recorded.dry = orders, bool(job.get("order"))
    trainer = Recorded(model=model, args=settings, train_dataset=Rows(Path(job["corpus"])), callbacks=[log])
    log.trainer = trainer
    trainer.train(resume_from_checkpoint=get_last_checkpoint(job["folder"]))


if __name__ == "__main__":
    main()
