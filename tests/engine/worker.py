"""Ranks of the engine's tests: run scenarios one after another in one process group, print one JSON line.

Arguments: a JSON file with {"config": TOML path, "scenarios": [{"name", "overrides", "steps", "load", "save"}]}.
A scenario builds a new engine, loads checkpoint `load` (a folder; the loader's place from `loader_of`, another) if
given, trains `steps` steps, saves into `save`.
Of the batches (from 0) in `unseen` nothing is computed; those in `spoilt` are multiplied, their gradients discarded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from millrace.core.config import load_config
from millrace.core.process import run_process
from millrace.data.state import LoaderState
from millrace.engine.checkpoint.read import digest, load_checkpoint, open_verified
from millrace.engine.checkpoint.saver import save_checkpoint
from millrace.engine.distributed import join_world, leave_world, world_size
from millrace.engine.engines import Engines
from millrace.engine.pace import Pace
from millrace.engine.zero import deepspeed_config
from millrace.pretrain.config import PretrainConfig, resolve
from millrace.pretrain.loop import accumulate
from millrace.pretrain.objectives.base import Objective
from millrace.pretrain.run import build_engines, build_loader_at, objective_of, precision_of


def run(config_path: str, scenario: dict[str, Any]) -> dict[str, Any]:
    config = load_config(PretrainConfig, config_path, scenario.get("overrides", []))
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = deepspeed_config(
        config.engine,
        precision_of(config),
        micro_batch=config.train.micro_batch,
        accumulation=resolve(config, world_size()).accumulation,
        clip=config.optim.clip,
    )
    world = join_world(settings)
    with build_loader_at(config, world, None) as probe:
        kind, setting = objective_of(config, settings, probe.tokenizer)
    objective = kind.build(setting)
    engine = build_engines(config, world, objective)
    result: dict[str, Any] = {"name": scenario["name"], "wrapper": type(engine.main.ds.optimizer).__name__}
    state = None
    if scenario.get("load"):
        checkpoint = open_verified(Path(scenario["load"]), world)
        load_checkpoint(checkpoint, engine.adapter)
        ahead = open_verified(Path(scenario.get("loader_of", scenario["load"])), world)
        state = LoaderState.from_dict(ahead.json("trainer")["loader"])
    if scenario.get("load") or scenario.get("digest"):
        engine.adapter.allocate()
        result["loaded"] = digest(engine.adapter, world)
    result |= train(config, objective, engine, state, scenario)
    return result


def train(config: Any, objective: Objective, engine: Engines, state: Any, scenario: dict[str, Any]) -> dict[str, Any]:
    world = engine.world
    losses, spans, norms, targets, rows, gradient = [], [], [], [], [], []
    with build_loader_at(config, world, state) as loader:
        for number in range(scenario["steps"]):
            batch = next(loader)
            if number in scenario.get("unseen", ()):
                continue
            if str(number) in (spoilt := scenario.get("spoilt", {})):
                spoil(engine, batch, float(spoilt[str(number)]))
                continue
            views = [objective.view(micro) for micro in batch.micro_batches]
            (tokens,) = world.sum(sum(objective.targets(view) for view in views))
            figures, square = accumulate(objective, engine, views, tokens, Pace(world, []))
            grads = engine.norms(gradients=True)
            if scenario.get("gradient") and not gradient:
                from deepspeed.utils import safe_get_full_grad

                params = sorted(engine.adapter.named)
                gradient = torch.cat([safe_get_full_grad(p).float().flatten() for _, p in params]).tolist()
            targets.append(int(tokens))
            rows += [int((m.labels_BT != -100).sum()) for m in batch.micro_batches]
            engine.step(config.optim.lr)
            stepped = engine.main.ds.get_global_grad_norm()  # what DeepSpeed found, where it looks
            norms.append([world.sum(square)[0] ** 0.5, sum(v * v for v in grads.values()) ** 0.5])
            norms[-1] += [] if stepped is None else [float(stepped)]
            losses.append(float(world.sum(figures["loss"])[0] / tokens).hex())
            spans.append(batch.spans)
        if scenario.get("save"):
            trainer = {"loader": loader.state.to_dict()}
            save_checkpoint(Path(scenario["save"]), scenario["steps"], engine.adapter, world, {"trainer": trainer})
    figures = {"losses": losses, "spans": spans, "norms": norms, "targets": targets, "row_targets": rows}
    return {**figures, "gradient": gradient, "after": digest(engine.adapter, world)}


def spoil(engine: Engines, batch: Any, factor: float) -> None:
    """Backward of the batch with its loss multiplied on rank 0 alone, and then none of it."""
    for number, micro in enumerate(batch.micro_batches):
        nll, _ = engine.main.forward(micro)
        mine = factor if engine.world.main else 1.0
        engine.main.backward(nll * mine, 1.0, last=number == len(batch.micro_batches) - 1)
    engine.discard()


def main() -> int:
    job = json.loads(Path(sys.argv[1]).read_text())
    results = [run(job["config"], scenario) for scenario in job["scenarios"]]
    print("RESULT " + json.dumps(results), flush=True)
    leave_world()
    return 0


if __name__ == "__main__":
    run_process(main)
