"""Ranks of the toy's tests: several ZeRO stages in one process group. Arguments: JSON {"scenarios": [...]}.

A scenario takes `steps` steps from batch `first` on, forgets the gradients of those in `spoilt`, does not see those in
`unseen`; it loads from and saves into folders.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from millrace.core.process import run_process
from millrace.engine.checkpoint.read import digest, load_checkpoint, open_verified
from millrace.engine.checkpoint.saver import save_checkpoint
from millrace.engine.checkpoint.write import fixed_tensors
from millrace.engine.config import EngineConfig
from millrace.engine.distributed import join_world, leave_world
from millrace.engine.engine import Engine
from millrace.engine.engines import Engines
from millrace.engine.pace import Pace
from millrace.engine.zero import deepspeed_config
from millrace.pretrain.loop import accumulate

sys.path.append(str(Path(__file__).parents[2]))
from tests.pretrain.toy import Toy

ROWS = 8


def batch(number: int) -> torch.Tensor:
    """(ROWS, 8), the same on every rank."""
    return torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(number))


def run(scenario: dict[str, Any]) -> dict[str, Any]:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = EngineConfig(zero_stage=scenario["stage"], persistence_threshold=scenario.get("threshold"))
    world = join_world(deepspeed_config(config, "fp32", micro_batch=2, accumulation=1, clip=0.0))
    toy = Toy.build(None)
    made = {
        name: Engine(world, module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad]), 0.0,
                     toy.factors.get(name, 1.0))
        for name, module in toy.modules.items()
    }  # fmt: skip
    engines = Engines(made)
    if scenario.get("load"):
        load_checkpoint(open_verified(Path(scenario["load"]), world), engines.adapter)
    losses = []
    for number in range(scenario.get("first", 0), scenario["steps"]):
        if number in scenario.get("unseen", ()):
            continue
        mine = batch(number).chunk(world.size)[world.rank].split(2)
        if number in scenario.get("spoilt", ()):
            mine = [x * float("nan") if world.main else x * 9 for x in mine]
        figures, square = accumulate(toy, engines, list(mine), ROWS, Pace(world, []))
        taken = number not in scenario.get("spoilt", ())
        engines.step(0.05) if taken else engines.discard()
        toy.end_step(engines, taken=taken)
        if taken:
            losses.append(world.sum(figures["loss"], figures["adversary"], square))
    engines.adapter.allocate()
    if scenario.get("save"):
        save_checkpoint(Path(scenario["save"]), scenario["steps"], engines.adapter, world, {"trainer": {}})
    fixed = {name: tensor.tolist() for name, tensor in fixed_tensors(engines.adapter).items()}
    return {"name": scenario["name"], "losses": losses, "digest": digest(engines.adapter, world), "fixed": fixed}


def main() -> int:
    scenarios = json.loads(Path(sys.argv[1]).read_text())["scenarios"]
    print("RESULT " + json.dumps([run(scenario) for scenario in scenarios]), flush=True)
    leave_world()
    return 0


if __name__ == "__main__":
    run_process(main)
