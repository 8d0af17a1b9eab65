"""Low-rank adapters through peft: put into a model before it is sharded, written as a peft folder afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from millrace.core.errors import UserError
from millrace.engine.checkpoint.read import Checkpoint
from millrace.engine.checkpoint.tensorfile import write_tensors
from millrace.engine.trained import PREFIX
from millrace.finetune.sections import LoraConfig
from millrace.finetune.source import quietly

_PEFT_PREFIX = "base_model.model."
_ADAPTER = ".default"  # peft's name for the one adapter, which its files leave out


def peft_config(section: LoraConfig, task_type: str, base: str, heads: list[str]) -> Any:
    """peft's own configuration. `heads` are trained whole and saved beside the adapters."""
    from peft import LoraConfig as PeftLora
    from peft import TaskType

    return PeftLora(
        r=section.r,
        lora_alpha=section.alpha or 2 * section.r,
        lora_dropout=0.0,
        target_modules=section.target_modules,
        task_type=TaskType(task_type),
        base_model_name_or_path=base,
        modules_to_save=heads or None,
    )


def add_adapters(model: Any, config: Any, seed: int) -> None:
    """Put adapters into `model` in place; only they and the heads (`modules_to_save`) stay trainable.

    Their first weights are drawn from `seed` in the order of the modules, so they are equal on every rank, at every
    ZeRO stage and world size. Call it before the engine is built; a partitioned model (ZeRO 3) will do.

    Raises:
        UserError: no module has one of the names in lora.target_modules.
    """
    from peft import inject_adapter_in_model

    heads, config.modules_to_save = config.modules_to_save, None  # peft would keep a frozen copy of each head
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            quietly(lambda: inject_adapter_in_model(config, model))
    except ValueError as error:
        leaves = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise UserError(
            f"lora.target_modules = {sorted(config.target_modules)} fits no layer of '{model.config.model_type}': "
            f"{error}; its linear layers are {', '.join(leaves)}"
        ) from None
    config.modules_to_save = heads
    for head in heads or ():
        model.get_submodule(head).requires_grad_(True)


def save_adapter(checkpoint: Checkpoint, config: Any, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json from a checkpoint's fp32 masters."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {_PEFT_PREFIX + n.removeprefix(PREFIX).replace(_ADAPTER, ""): n for n in checkpoint.manifest["params"]}
    shapes = {key: (torch.float32, tuple(checkpoint.manifest["params"][name])) for key, name in names.items()}
    path = folder / "adapter_model.safetensors"
    write_tensors(path, shapes, lambda key: checkpoint.master(names[key]), {"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(folder)


def merge(model: Any, adapter: Path) -> Any:
    """`model` (on one process) with the adapters in folder `adapter` added into its weights."""
    from peft import PeftModel

    return quietly(lambda: PeftModel.from_pretrained(model, str(adapter)).merge_and_unload())
