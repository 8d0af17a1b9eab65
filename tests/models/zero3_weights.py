"""Ranks of test_zero3.py: builds models at stage 3 and reports digests of their weights.

Arguments: output JSON, folder of a saved model, folder of a saved mixture.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # where there are GPUs, too
import deepspeed
import torch
from deepspeed.runtime.zero import partition_parameters

from millrace.core.errors import UserError
from millrace.engine.ops import use_operators
from millrace.models.bridge import build_model
from millrace.models.config import ModelConfig

warnings.filterwarnings("ignore")


def zero3(dtype: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }


def digest(model: torch.nn.Module) -> str:
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            sha.update(name.encode() + parameter.detach().float().numpy().tobytes())
    for name, buffer in model.named_buffers():
        sha.update(f"{name} {buffer.dtype}".encode() + buffer.float().numpy().tobytes())
    return sha.hexdigest()


class Peak:
    """Largest number of weights that were whole at one time, in construction and in gathering."""

    def __init__(self) -> None:
        self.numel = 0
        self.live = 0

    def __enter__(self) -> Peak:
        peak, self.saved = self, (partition_parameters.GatheredParameters, partition_parameters.Init._post_init_method)

        class Gathered(self.saved[0]):  # type: ignore[misc, name-defined]
            def __enter__(self) -> None:
                super().__enter__()
                peak.live += sum(p.ds_numel for p in self.params)
                peak.numel = max(peak.numel, peak.live)

            def __exit__(self, *exception: object) -> None:
                peak.live -= sum(p.ds_numel for p in self.params)
                super().__exit__(*exception)

        def post_init(context: Any, module: torch.nn.Module) -> None:
            peak.numel = max(peak.numel, sum(p.data.numel() for p in module.parameters()))
            peak.saved[1](context, module)

        deepspeed.zero.GatheredParameters = Gathered
        partition_parameters.Init._post_init_method = post_init
        return self

    def __exit__(self, *exception: object) -> None:
        deepspeed.zero.GatheredParameters = self.saved[0]
        partition_parameters.Init._post_init_method = self.saved[1]


def main(out: str, saved: str, mixture: str, broken: str) -> None:
    use_operators()
    deepspeed.init_distributed("gloo", verbose=False)
    cases = {
        "qwen3": (ModelConfig(depth=2), "fp32"),
        "qwen3 bf16": (ModelConfig(depth=2), "bf16"),
        "gpt2 tied": (ModelConfig(kind="gpt2", depth=2, config={"tie_word_embeddings": True}), "fp32"),
        "mixtral": (ModelConfig(kind="mixtral", depth=1), "fp32"),
        "from folder": (ModelConfig(init=saved), "fp32"),
        "from mixture": (ModelConfig(init=mixture), "fp32"),
    }
    result: dict[str, Any] = {}
    for name, (config, dtype) in cases.items():
        model = build_model(config, 500, 64, 7, zero3(dtype))
        assert all(p.numel() == 0 for p in model.parameters()), "a parameter is whole after construction"
        result[name] = digest(model)
    with Peak() as peak:
        deep = build_model(ModelConfig(depth=6, config={"hidden_size": 64}), 500, 64, 7, zero3("fp32"))
    result["peak"] = {"numel": peak.numel, "total": sum(p.ds_numel for p in deep.parameters())}
    result["largest"] = max(p.ds_numel for p in deep.parameters())
    try:
        build_model(ModelConfig(init=broken), 500, 64, 7, zero3("fp32"))
    except UserError as error:
        result["refused"] = str(error)
    if torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
