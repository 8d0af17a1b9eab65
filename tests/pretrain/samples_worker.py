"""Ranks that train an objective on samples, at several ZeRO stages in one process group.

Arguments: JSON {"scenarios": [...]}. A scenario names `objective` and `model` sections, ZeRO `stage` and rows of a
`micro`-batch, and takes `steps` steps from batch `first` on; it may `load` and `save` checkpoints.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState

from millrace.core.config import build
from millrace.core.process import run_process
from millrace.core.registry import load, lookup
from millrace.data.batch import SampleBatch
from millrace.engine.checkpoint.read import digest, load_checkpoint, open_verified
from millrace.engine.checkpoint.saver import save_checkpoint
from millrace.engine.config import EngineConfig
from millrace.engine.distributed import join_world, leave_world
from millrace.engine.engine import Engine
from millrace.engine.engines import Engines
from millrace.engine.pace import Pace
from millrace.engine.zero import deepspeed_config
from millrace.models.config import ModelConfig
from millrace.pretrain.config import EvalSection
from millrace.pretrain.loop import accumulate
from millrace.pretrain.objectives import CONFIGS, REGISTRY
from millrace.pretrain.objectives.base import Objective, Setting

ROWS, BAD = 8, 5
LR = 1e-3


class Words:
    """Of a tokenizer what objectives ask."""

    vocab_size = 50


def objective_of(scenario: dict[str, Any], zero3: dict[str, Any] | None = None) -> Objective:
    section = scenario["objective"]
    setting = Setting(
        objective=build(load(CONFIGS[section["kind"]]), section), model=build(ModelConfig, scenario["model"]),
        eval=EvalSection(), tokenizer=Words(), sequence_length=16, rows="samples", seed=0, zero3=zero3,
    )  # fmt: skip
    kind: type[Objective] = lookup(REGISTRY, section["kind"], "objective")
    kind.check(setting)
    return kind.build(setting)


def samples(number: int, first: int, stop: int) -> SampleBatch:
    """Rows [first, stop) of global batch `number`: smooth pictures and tones, of which one is bad."""
    random = np.random.default_rng(number)
    phase, pitch = random.random((ROWS, 1)) * 6.3, random.integers(1, 9, (ROWS, 1))
    across = np.linspace(0, 6.3, 16)
    waves = np.sin(across * pitch + phase)[:, None, :, None] * np.cos(across + phase)[:, :, None, None]
    images = (127.5 * (1 + waves * random.random((ROWS, 1, 1, 3)))).astype(np.uint8)
    sounds = np.sin(np.linspace(0, 60, 400) * pitch + phase).astype(np.float32) * random.random((ROWS, 1), np.float32)
    part = slice(first, stop)
    words, lengths = random.integers(0, Words.vocab_size, (ROWS, 3)), random.integers(1, 4, ROWS)
    return SampleBatch(
        {
            "tokens": torch.from_numpy(words[part]),
            "image": torch.from_numpy(images[part]),
            "audio": torch.from_numpy(sounds[part]),
        },
        {"tokens": torch.from_numpy(lengths[part]), "audio": torch.full((stop - first,), 400)},
        list(range(first, stop)),
        [row != BAD for row in range(first, stop)],
        random.integers(0, 2**63, ROWS).astype(np.uint64)[part] * np.uint64(2),
    )


def run(scenario: dict[str, Any]) -> dict[str, Any]:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = EngineConfig(zero_stage=scenario["stage"], persistence_threshold=scenario.get("threshold"))
    settings = deepspeed_config(config, scenario.get("precision", "fp32"), micro_batch=1, accumulation=1, clip=0.0)
    world = join_world(settings)
    zero3 = {**settings, "train_batch_size": world.size} if scenario["stage"] == 3 else None
    objective = objective_of(scenario, zero3)
    engines = Engines(
        {
            name: Engine(world, module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad]), 0.0,
                         objective.factors.get(name, 1.0))
            for name, module in objective.modules.items()
        }
    )  # fmt: skip
    if scenario.get("load"):
        load_checkpoint(open_verified(Path(scenario["load"]), world), engines.adapter)
    first = digest(engines.adapter, world)
    each, found = ROWS // world.size, []
    for number in range(scenario.get("first", 0), scenario["steps"]):
        starts = range(world.rank * each, (world.rank + 1) * each, scenario["micro"])
        micros = [samples(number, start, start + scenario["micro"]) for start in starts]
        views = [objective.view(micro) for micro in micros]
        (targets,) = world.sum(sum(objective.targets(view) for view in views))
        figures, square = accumulate(objective, engines, views, targets, Pace(world, []))
        engines.step(LR)
        objective.end_step(engines, taken=True)
        *sums, total = world.sum(*figures.values(), square)
        found.append([*(value / targets for value in sums), total])
    if scenario.get("save"):
        save_checkpoint(Path(scenario["save"]), scenario["steps"], engines.adapter, world, {"trainer": {}})
    result = {"name": scenario["name"], "figures": list(objective.figures), "found": found, "loaded": first}
    kept = {name: str(buffer.dtype) for name, buffer in engines.main.module.named_buffers()}
    return result | {"after": digest(engines.adapter, world), "buffers": kept}


def main() -> int:
    scenarios = json.loads(Path(sys.argv[1]).read_text())["scenarios"]
    print("RESULT " + json.dumps([run(scenario) for scenario in scenarios]), flush=True)
    leave_world()
    return 0


if __name__ == "__main__":
    run_process(main)
