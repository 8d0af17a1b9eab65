"""Ranks of the export test: for each scenario train one step, save a checkpoint, and keep the training model's logits.

Arguments: a JSON file with {"config": TOML path, "scenarios": [{"overrides", "out"}]}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from millrace.core.config import load_config
from millrace.core.process import run_process
from millrace.engine.checkpoint.saver import save_checkpoint
from millrace.engine.distributed import join_world, leave_world, world_size
from millrace.engine.pace import Pace
from millrace.engine.zero import deepspeed_config
from millrace.pretrain.config import PretrainConfig, resolve
from millrace.pretrain.loop import accumulate
from millrace.pretrain.run import build_engines, build_loader_at, objective_of, run_files


def run(config_path: str, scenario: dict[str, Any]) -> None:
    config = load_config(PretrainConfig, config_path, scenario["overrides"])
    AcceleratorState._reset_state(reset_partial_state=True)
    accumulation = resolve(config, world_size()).accumulation
    settings = deepspeed_config(
        config.engine, "fp32", micro_batch=config.train.micro_batch, accumulation=accumulation, clip=1.0
    )
    world = join_world(settings)
    out = Path(scenario["out"])
    with build_loader_at(config, world, None) as loader:
        kind, setting = objective_of(config, settings, loader.tokenizer)
        objective = kind.build(setting)
        engine = build_engines(config, world, objective)
        batch = next(loader)
        (tokens,) = world.sum(batch.local_tokens)
        accumulate(objective, engine, batch.micro_batches, tokens, Pace(world, []))
        engine.step(0.02)
        files = run_files(config, objective)
        extra = {"trainer": {"step": 1, "loader": loader.state.to_dict()}, "files": files}
        save_checkpoint(out / "checkpoints", 1, engine.adapter, world, extra)
    ids_BT = torch.arange(128).reshape(2, 64) * 7 % 300
    engine.train(False)
    with torch.no_grad():
        logits_BTV = engine.main.module.model(input_ids=ids_BT, use_cache=False).logits
    if world.main:
        save_file({"ids": ids_BT, "logits": logits_BTV.float().contiguous()}, out / "logits.safetensors")
    world.barrier()


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text())
    for scenario in job["scenarios"]:
        run(job["config"], scenario)
    leave_world()
    return 0


if __name__ == "__main__":
    run_process(main)
