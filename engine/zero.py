"""The DeepSpeed configuration of a run: ours, with a user's own JSON or Accelerate configuration honoured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from millrace.core.errors import UserError
from millrace.engine.config import EngineConfig

# Keys that the loop computes from; a user's value that differs is refused instead of being ignored.
_OURS = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "train_batch_size",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)


def deepspeed_config(config: EngineConfig, precision: str, *, micro_batch: int, accumulation: int, clip: float) -> dict:
    """The dict for `deepspeed.initialize`; `train_batch_size` is left to DeepSpeed, which derives it.

    Raises:
        UserError: the user's JSON cannot be read, or sets a key that millrace must set to another value.
    """
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "stage3_gather_16bit_weights_on_model_save": False,
        # Either way DeepSpeed all-reduces a bucket; "scatter" also copies it out and back in (3% of a step on a CPU).
        "reduce_scatter": False,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_params:
        zero["offload_param"] = {"device": "cpu"}
    if config.persistence_threshold is not None:
        zero["stage3_param_persistence_threshold"] = config.persistence_threshold
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # Always set: DeepSpeed's (through Accelerate) default of 1.0 clips in silence.
        "gradient_clipping": clip,
        "zero_optimization": zero,
        # torch's own AdamW also steps offloaded states: no compiled operator is needed.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
    }
    if precision == "bf16":
        made["bf16"] = {"enabled": True}
        if config.zero_stage:
            made["data_types"] = {"grad_accum_dtype": "fp32"}
    if precision == "autocast":
        # Nothing is sent in bf16, as DeepSpeed would send the weights of linear layers and their gradients.
        made["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    merged = _merge_user(made, _user_config(config))
    if merged["zero_optimization"]["stage"] == 0 and not merged.get("bf16", {}).get("enabled"):
        # Here DeepSpeed clips but keeps the norm to itself; millrace.engine.engine clips instead.
        merged["gradient_clipping"] = 0.0
    return merged


def bucket_elements(parameters: int) -> int:
    """Elements of a communication bucket for a model of so many trained parameters: a quarter of them.

    DeepSpeed's 5e8 for every model is the upper bound: a small one would lie in a single bucket, a second copy of all
    its gradients that also falls out of the caches. Below a million elements the latency of a call counts.
    """
    return min(max(parameters // 4, 1_000_000), 500_000_000)


def fit_buckets(settings: dict[str, Any], parameters: int) -> None:
    """Fill in the bucket sizes of `settings`, in place, where the user has set none."""
    elements = bucket_elements(parameters)
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        settings["zero_optimization"].setdefault(key, elements)


def gather_by_block(model: nn.Module) -> None:
    """Let ZeRO 3 gather and release the weights of a whole transformer block at once, as FSDP does, before `Engine`.

    Hooks of every layer inside it would cost 8% of a step, and break a compiled graph at each of them. Only where all
    weights are trained: DeepSpeed releases such a block too early where its input needs no gradient, as with adapters;
    so a block that holds an embedding, which may be the first, is not one of them. And only in models of tokens: blocks
    of others may read what needs no gradient, or be called for several views, and their gradients be reduced twice.
    """
    if getattr(model, "main_input_name", "") != "input_ids":
        return
    from deepspeed.utils import set_z3_leaf_modules

    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in blocks and any(isinstance(part, nn.Embedding) for part in module.modules()):
            blocks.remove(type(module).__name__)
    if all(p.requires_grad for p in model.parameters()):
        set_z3_leaf_modules(model, sorted(blocks), raise_if_not_found=False)


def _user_config(config: EngineConfig) -> tuple[dict[str, Any], str]:
    """The user's DeepSpeed keys and where they came from; the JSON of the configuration wins over Accelerate's."""
    path = config.deepspeed_config or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path and path != "none":
        try:
            loaded = json.loads(Path(path).read_text())
        except FileNotFoundError:
            raise UserError(f"no DeepSpeed configuration {path} (engine.deepspeed_config)") from None
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"cannot read the DeepSpeed configuration {path}: {error}") from None
        return loaded, path
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        return _from_accelerate(), "the Accelerate configuration"
    return {}, ""


def _from_accelerate() -> dict[str, Any]:
    """The DeepSpeed fields that `accelerate launch --config_file` hands over in the environment."""
    env = os.environ
    stage = int(env["ACCELERATE_DEEPSPEED_ZERO_STAGE"])
    zero: dict[str, Any] = {"stage": stage}
    for key in ("offload_optimizer", "offload_param"):
        device = env.get(f"ACCELERATE_DEEPSPEED_{key.upper()}_DEVICE", "none")
        if device != "none" and (stage == 3 or (key == "offload_optimizer" and stage)):
            zero[key] = {"device": device}
    clip = env.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    return {"zero_optimization": zero} | ({} if clip == "none" else {"gradient_clipping": float(clip)})


def _merge_user(made: dict[str, Any], user_and_place: tuple[dict[str, Any], str]) -> dict[str, Any]:
    user, place = user_and_place
    for key in _OURS:
        value = user.get(key, "auto")
        if value in ("auto", None) or value == made.get(key):
            continue
        mend = {
            "optimizer": "use [optim]",
            "scheduler": "use [schedule]",
            "gradient_clipping": "use optim.clip",
        }.get(key, "use train.batch and train.micro_batch")
        raise UserError(f"{place} sets {key} = {value!r}, which millrace derives ({made.get(key)!r}); {mend} instead")
    merged = dict(made)
    for key, value in user.items():
        if key in _OURS or value == "auto":
            continue
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merged[key] | {k: v for k, v in value.items() if v != "auto"}
        else:
            merged[key] = value
    return merged
