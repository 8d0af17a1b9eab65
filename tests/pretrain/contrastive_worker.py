"""Ranks of the contrastive test: the gradient of one global batch. Arguments: JSON {"scenarios": [...]}."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState

from millrace.core.process import run_process
from millrace.data.batch import SampleBatch
from millrace.engine.config import EngineConfig
from millrace.engine.distributed import join_world, leave_world
from millrace.engine.engine import Engine
from millrace.engine.engines import Engines
from millrace.engine.pace import Pace
from millrace.engine.zero import deepspeed_config
from millrace.pretrain.loop import accumulate
from millrace.pretrain.objectives.config import ContrastiveConfig
from millrace.pretrain.objectives.contrastive import Contrastive

ROWS, BAD = 8, 5
_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWERS: list[dict[str, Any]] = [
    {"modality": "text", "kind": "bert", "config": _TEXT | {"max_position_embeddings": 16}},
    {"modality": "image", "kind": "vit", "config": _TEXT | {"image_size": 8, "patch_size": 4}},
    {"modality": "audio", "kind": "convnextv2", "config": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
     "mel": {"rate": 8000, "window": 64, "hop": 16, "bands": 16}},
]  # fmt: skip


class Words:
    """Of a tokenizer what the objective asks."""

    vocab_size = 50


def build(loss: str, zero3: dict[str, Any] | None = None) -> Contrastive:
    from millrace.models.config import ModelConfig
    from millrace.pretrain.config import EvalSection
    from millrace.pretrain.objectives.base import Setting

    section = ContrastiveConfig(towers=TOWERS, width=12, loss=loss, scale=5.0, bias=-1.0)  # type: ignore[arg-type]
    setting = Setting(
        objective=section, model=ModelConfig(), eval=EvalSection(), tokenizer=Words(),  # type: ignore[arg-type]
        sequence_length=16, rows="samples", seed=0, zero3=zero3,
    )  # fmt: skip
    return Contrastive.build(setting)


def samples(first: int, stop: int) -> SampleBatch:
    """Rows [first, stop) of a global batch, of which one is bad."""
    random = np.random.default_rng(1)
    words, lengths = random.integers(0, 50, (ROWS, 12)), random.integers(1, 13, ROWS)
    images, sounds = random.integers(0, 256, (ROWS, 8, 8, 3)), random.standard_normal((ROWS, 400))
    part = slice(first, stop)
    return SampleBatch(
        {
            "tokens": torch.from_numpy(words[part]),
            "image": torch.from_numpy(images[part].astype(np.uint8)),
            "audio": torch.from_numpy(sounds[part].astype(np.float32)),
        },
        {"tokens": torch.from_numpy(lengths[part])},
        list(range(first, stop)),
        [number != BAD for number in range(first, stop)],
    )


def run(scenario: dict[str, Any]) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_grad

    AcceleratorState._reset_state(reset_partial_state=True)
    config = EngineConfig(zero_stage=scenario["stage"], persistence_threshold=0)
    settings = deepspeed_config(config, "fp32", micro_batch=1, accumulation=1, clip=0.0)
    world = join_world(settings)
    objective = build(
        scenario["loss"], {**settings, "train_batch_size": world.size} if scenario["stage"] == 3 else None
    )
    module = objective.modules["model"]
    engines = Engines({"model": Engine(world, module, torch.optim.AdamW(module.parameters()), 0.0)})
    size, each = scenario["micro"], ROWS // world.size
    starts = range(world.rank * each, (world.rank + 1) * each, size)
    views = [samples(start, start + size) for start in starts]
    targets = sum(objective.targets(view) for view in views)
    (total,) = world.sum(targets)
    figures, _ = accumulate(objective, engines, views, total, Pace(world, []))
    loss, accuracy = (value / total for value in world.sum(figures["loss"], figures["accuracy"]))
    grads = {name: safe_get_full_grad(param) for name, param in engines.adapter.named}
    assert all(grad is not None for grad in grads.values()), [name for name, grad in grads.items() if grad is None]
    gradient = {name: grad.flatten().tolist() for name, grad in grads.items()}
    engines.discard()
    return {"name": scenario["name"], "loss": loss, "accuracy": accuracy, "gradient": gradient}


def main() -> int:
    scenarios = json.loads(Path(sys.argv[1]).read_text())["scenarios"]
    print("RESULT " + json.dumps([run(scenario) for scenario in scenarios]), flush=True)
    leave_world()
    return 0


if __name__ == "__main__":
    run_process(main)
