"""Ranks that train an objective on samples, at several ZeRO stages in one process group.

Arguments: JSON {"scenarios": [...]}. A scenario names `objective` and `model` sections, ZeRO `stage` and rows of a
`micro`-batch, and takes `steps` steps from batch `first` on; it may `load` and `save` checkpoints. Only the first
`images` rows have one. `batches` names the function that makes the batches, where it is not `samples`; a held-out
`batch` of them is evaluated at the end. `setting` is what an objective is told of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from transformers import PreTrainedModel

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
from millrace.engine.zero import deepspeed_config, gather_by_block
from millrace.eval.heldout import evaluate
from millrace.models.config import ModelConfig
from millrace.pretrain.config import EvalSection
from millrace.pretrain.loop import accumulate
from millrace.pretrain.objectives import CONFIGS, REGISTRY
from millrace.pretrain.objectives.base import Objective, Setting

sys.path.append(str(Path(__file__).parents[2]))  # of the module that a scenario names

ROWS, BAD = 8, 5
WORDS = 50
CODES = {"image": 16, "audio": 12}
LR = 1e-3


class Words:
    """Of a tokenizer what objectives ask."""

    eos_id = bos_id = 0
    sha256 = "words"

    def __init__(self, added: Sequence[str] = ()) -> None:
        self.added, self.vocab_size, self.backend = list(added), WORDS + len(added), self

    def extended(self, tokens: dict[str, str], others: Sequence[str] = ()) -> Words:
        return Words([*self.added, *tokens.values(), *others])

    def token_to_id(self, token: str) -> int | None:
        return WORDS + self.added.index(token) if token in self.added else None

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) % self.vocab_size for text in texts]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def special(self, name: str) -> int:
        return self.vocab_size - 1


def objective_of(scenario: dict[str, Any], zero3: dict[str, Any] | None = None) -> Objective:
    section = scenario["objective"]
    setting = Setting(
        objective=build(load(CONFIGS[section["kind"]]), section), model=build(ModelConfig, scenario["model"]),
        eval=EvalSection(), tokenizer=Words(), seed=0, zero3=zero3, manifests=tuple(scenario.get("manifests", ())),
        **{"sequence_length": 32, "rows": "samples"} | scenario.get("setting", {}),
    )  # fmt: skip
    kind: type[Objective] = lookup(REGISTRY, section["kind"], "objective")
    kind.check(setting)
    return kind.build(setting)


def samples(number: int, first: int, stop: int, pictured: int = ROWS) -> SampleBatch:
    """Rows [first, stop) of global batch `number`: smooth pictures (also in views) and tones, of which one is bad.

    Codes of pictures are in the first half only, those of sounds in the second, but for the last row, which is text.
    """
    random = np.random.default_rng(number)
    phase, pitch = random.random((ROWS, 1)) * 6.3, random.integers(1, 9, (ROWS, 1))
    across = np.linspace(0, 6.3, 16)
    waves = np.sin(across * pitch + phase)[:, None, :, None] * np.cos(across + phase)[:, :, None, None]
    images = (127.5 * (1 + waves * random.random((ROWS, 1, 1, 3)))).astype(np.uint8)
    sounds = np.sin(np.linspace(0, 60, 400) * pitch + phase).astype(np.float32) * random.random((ROWS, 1), np.float32)
    part = slice(first, stop)
    images[pictured:] = 0
    found = {"image_codes": (0, ROWS // 2, 9), "audio_codes": (ROWS // 2, ROWS - 1, 7)}
    codes = {
        role: np.arange(width) * pitch % CODES[role.removesuffix("_codes")] for role, (_, _, width) in found.items()
    }
    there = {role: [width * (a <= row < b) for row in range(ROWS)] for role, (a, b, width) in found.items()}
    words, lengths = random.integers(0, WORDS, (ROWS, 3)), random.integers(1, 4, ROWS)
    return SampleBatch(
        {
            "tokens": torch.from_numpy(words[part]),
            "image": torch.from_numpy(images[part]),
            "audio": torch.from_numpy(sounds[part]),
            **{role: torch.from_numpy(values[part]) for role, values in codes.items() if any(there[role][part])},
            "large0": torch.from_numpy(images[part]),
            "large1": torch.from_numpy(images[part, ::-1].copy()),
            "small0": torch.from_numpy(images[part, :8, 8:].copy()),
        },
        {
            "tokens": torch.from_numpy(lengths[part]),
            "audio": torch.full((stop - first,), 400),
            **{role: torch.tensor(counts[part]) for role, counts in there.items()},
        },
        list(range(first, stop)),
        [row != BAD for row in range(first, stop)],
        random.integers(0, 2**63, ROWS).astype(np.uint64)[part] * np.uint64(2),
        {"image": [row < pictured and row != BAD for row in range(first, stop)]},
    )


def run(scenario: dict[str, Any]) -> dict[str, Any]:
    AcceleratorState._reset_state(reset_partial_state=True)
    config = EngineConfig(zero_stage=scenario["stage"], persistence_threshold=scenario.get("threshold"))
    settings = deepspeed_config(config, scenario.get("precision", "fp32"), micro_batch=1, accumulation=1, clip=0.0)
    world = join_world(settings)
    zero3 = {**settings, "train_batch_size": world.size} if scenario["stage"] == 3 else None
    objective = objective_of(scenario, zero3)
    models = [p for module in objective.modules.values() for p in module.modules() if isinstance(p, PreTrainedModel)]
    for model in models if scenario["stage"] == 3 else ():
        gather_by_block(model)  # as a run does
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
    batches = (
        load(scenario["batches"]) if "batches" in scenario else partial(samples, pictured=scenario.get("images", ROWS))
    )
    each, found = ROWS // world.size, []
    names = [name for name in objective.figures if not name.startswith("max_")]
    for number in range(scenario.get("first", 0), scenario["steps"]):
        starts = range(world.rank * each, (world.rank + 1) * each, scenario["micro"])
        micros = [batches(number, start, start + scenario["micro"]) for start in starts]
        views = [objective.view(micro) for micro in micros]
        (weight,) = world.sum(sum(objective.weight(view) for view in views))
        figures, square = accumulate(objective, engines, views, weight, Pace(world, []))
        engines.step(LR)
        objective.end_step(engines, taken=True)
        *sums, total = world.sum(*(figures[name] for name in names), square)
        found.append([*(value / weight for value in sums), total])
    if scenario.get("save"):
        extra = {"trainer": {}, "files": objective.files()}
        save_checkpoint(Path(scenario["save"]), scenario["steps"], engines.adapter, world, extra)
    result = {"name": scenario["name"], "figures": names, "found": found, "loaded": first}
    if "batch" in scenario:
        rows = batches(scenario["batch"], world.rank * each, (world.rank + 1) * each)
        measured = evaluate(objective, engines, [(rows, 0)])
        result["heldout"] = {"loss": measured.loss, **measured.averages}
    if "shown" in scenario:
        result["shown"] = load(scenario["shown"])(objective, engines)
    kept = {name: str(buffer.dtype) for name, buffer in engines.main.module.named_buffers()}
    return result | {"after": digest(engines.adapter, world), "buffers": kept}


def main() -> int:
    scenarios = json.loads(Path(sys.argv[1]).read_text())["scenarios"]
    print("RESULT " + json.dumps([run(scenario) for scenario in scenarios]), flush=True)
    leave_world()
    return 0


if __name__ == "__main__":
    run_process(main)
