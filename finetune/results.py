"""What a finished run leaves for others: an adapter and a merged model, or the whole tuned model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from millrace.core.rundir import RunDir
from millrace.engine.checkpoint.read import Checkpoint, list_checkpoints
from millrace.engine.export import export
from millrace.engine.trained import PREFIX
from millrace.finetune.lora import merge, save_adapter
from millrace.finetune.source import quietly
from millrace.finetune.task import Task

ADAPTER, MERGED, MODEL = "adapter", "merged", "model"


def write_results(rundir: RunDir, task: Task, base: str, peft: Any | None) -> list[Path]:
    """Write them from the newest checkpoint; call it on one rank, after the last step.

    With adapters: `adapter/` (peft) and `merged/` (Hugging Face; the base is read whole, in fp32). Without:
    `model/`, written tensor by tensor.
    """
    checkpoint = Checkpoint(list_checkpoints(rundir.checkpoints)[0])
    config = transformers.AutoConfig.from_pretrained(checkpoint.path / "model")
    if peft is None:
        target = rundir.path / MODEL
        if hasattr(transformers, config.architectures[0]):
            export(checkpoint.path, target)
        else:  # a classifier that transformers does not have, see millrace.finetune.classify
            model = task.load(Path(base), config)
            _fill(model, checkpoint)
            _save(model, checkpoint, target)
        return [target]
    adapter, merged = rundir.path / ADAPTER, rundir.path / MERGED
    save_adapter(checkpoint, peft, adapter)
    _save(merge(task.load(Path(base), config), adapter), checkpoint, merged)
    return [adapter, merged]


@torch.no_grad()
def _fill(model: Any, checkpoint: Checkpoint) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(checkpoint.master(PREFIX + name))


def _save(model: Any, checkpoint: Checkpoint, folder: Path) -> None:
    """A Hugging Face folder, with the tokenizer of the checkpoint; it appears whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.config.use_cache = True
    quietly(lambda: model.save_pretrained(temporary))
    for path in (checkpoint.path / "tokenizer").iterdir():
        shutil.copy(path, temporary / path.name)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
