"""Peak memory of one rank for ZeRO 0, 1, 2 and 3 on 1, 2 and 4 ranks, beside the formula.

    python benchmarks/zero_memory.py [--ranks 1 2 4] [--stages 0 1 2 3] [--width 768] [--layers 8]

Each measurement is a fresh group of processes that builds model, engine and optimiser as a run does and takes three
steps of few tokens. On a CPU the figure is the largest resident set from the moment before the model is built, minus
the resident set at that moment; on a GPU it is torch's largest allocation. About 10 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import numpy as np
from common import fresh, worker_result

from millrace.core.console import say, warn

STAGES, RANKS = (0, 1, 2, 3), (1, 2, 4)
_PHASES = ("build", "forward", "backward", "step")
_LENGTH, _VOCABULARY, _STEPS = 64, 8192, 3


def formula(parameters: int, stage: int, ranks: int, precision: str) -> dict[str, float]:
    """Bytes of one rank by kind (ZeRO, https://arxiv.org/abs/1910.02054, section 3, for the stored states).

    In fp32 the weights are their own masters at stage 0; from stage 1 on DeepSpeed keeps a second, sharded copy. In
    bf16 gradients are accumulated in fp32 from stage 1 on (`grad_accum_dtype`), and in bf16 at stage 0.
    """
    width = 4 if precision == "fp32" else 2
    shard = parameters / ranks
    gradient = width if stage == 0 or precision == "fp32" else 4
    return {
        "parameters": width * (shard if stage == 3 else parameters),
        "gradients": gradient * (shard if stage >= 2 else parameters),
        "masters": 0.0 if stage == 0 and precision == "fp32" else 4 * (parameters if stage == 0 else shard),
        "moments": 8 * (parameters if stage == 0 else shard),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--stages", type=int, nargs="+", default=list(STAGES))
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _measure(json.loads(options.worker))
        return
    found = []
    environment = common.environment()
    for ranks in options.ranks:
        for stage in options.stages:
            job = {"stage": stage, "ranks": ranks, "width": options.width, "layers": options.layers}
            job["precision"] = options.precision
            say(f"ZeRO {stage} on {ranks} rank(s)")
            found.append({**job, **fresh(__file__, job, ranks)})
    _report(found, environment)


def _measure(job: dict[str, Any]) -> None:
    """One rank: join, note the memory, build and step, note the peak."""
    from millrace.core.config import load_config
    from millrace.engine.distributed import join_world, leave_world
    from millrace.engine.precision import choose_precision
    from millrace.engine.zero import deepspeed_config
    from millrace.pretrain.config import PretrainConfig
    from millrace.pretrain.run import build_engines, objective_of

    width = job["width"]
    sizes = {
        "hidden_size": width, "intermediate_size": 8 * width // 3, "num_hidden_layers": job["layers"],
        "num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64,
        "tie_word_embeddings": "false",
    }  # fmt: skip
    overrides = [f"model.config.{key}={value}" for key, value in sizes.items()]
    overrides += [f"engine.zero_stage={job['stage']}", f"data.sequence_length={_LENGTH}", "train.micro_batch=1"]
    config = load_config(PretrainConfig, None, [*overrides, f"train.batch={job['ranks']}"])
    precision = choose_precision(job["precision"])
    settings = deepspeed_config(config.engine, precision, micro_batch=1, accumulation=1, clip=config.optim.clip)
    world = join_world(settings)
    _warm_up(world)
    memory = _Memory(world.device)
    kind, setting = objective_of(config, settings, SimpleNamespace(vocab_size=_VOCABULARY))  # type: ignore[arg-type]
    engine = build_engines(config, world, kind.build(setting))
    memory.mark("build")
    for _ in range(_STEPS):
        loss, _ = engine.main.forward(_batch())
        memory.mark("forward")
        engine.main.backward(loss, _LENGTH * job["ranks"], last=True)
        memory.mark("backward")
        engine.gradient_square()
        engine.step(1e-3)
        memory.mark("step")
    ranks = world.gather_objects(memory.peaks)
    largest = max(ranks, key=lambda peaks: max(peaks.values()))
    count = sum(getattr(p, "ds_numel", p.numel()) for p in engine.parameters())
    worker_result(peak=max(largest.values()), peaks=largest, end=memory.now(), parameters=count, precision=precision)
    leave_world()


def _warm_up(world: Any) -> None:
    """Load what is loaded on first use, so that it is not counted: BLAS, autograd, the collectives."""
    import torch

    a = torch.randn(512, 512, device=world.device, requires_grad=True)
    (a @ a).sum().backward()
    world.sum(1.0)


def _batch() -> Any:
    import torch

    from millrace.data.batch import MicroBatch

    ids = torch.randint(0, _VOCABULARY, (1, _LENGTH))
    return MicroBatch(ids, ids.clone(), torch.arange(_LENGTH)[None], [np.array([[0, 0, _LENGTH]])])


class _Memory:
    """Bytes since construction: of the process on a CPU, of torch's allocator on a GPU."""

    def __init__(self, device: Any) -> None:
        self._gpu = device if device.type == "cuda" else None
        self.peaks: dict[str, int] = {}  # by phase, the largest of all steps
        self._reset()
        self._before = self._read("VmRSS")

    def _reset(self) -> None:
        """Let the peak start again from here."""
        if self._gpu is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self._gpu)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")

    def _read(self, key: str) -> int:
        if self._gpu is not None:
            import torch

            read = torch.cuda.max_memory_allocated if key == "VmHWM" else torch.cuda.memory_allocated
            return int(read(self._gpu))
        lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key + ":")))

    def mark(self, phase: str) -> None:
        """End a phase: its peak is since the mark before."""
        self.peaks[phase] = max(self.peaks.get(phase, 0), self._read("VmHWM") - self._before)
        self._reset()

    def now(self) -> int:
        return self._read("VmRSS") - self._before


def _report(found: list[dict[str, Any]], environment: dict[str, Any]) -> None:
    rows = []
    for item in found:
        name = f"ZeRO {item['stage']}, {item['ranks']} rank(s)"
        if "error" in item:
            rows.append((name, "failed", *[""] * 6))
            warn(f"{name}: {item['error']}")
            continue
        parts = formula(item["parameters"], item["stage"], item["ranks"], item["precision"])
        item |= {"formula": parts, "formula_total": sum(parts.values())}
        total = item["formula_total"]
        figures = (total, *(item["peaks"][phase] for phase in _PHASES), item["end"])
        rows.append((name, *(f"{value / 2**20:,.0f}" for value in figures), f"{item['peak'] / item['parameters']:.1f}"))
    path = common.save("zero_memory", {"environment": environment, "measurements": found})
    columns = ["MiB of the largest rank", "formula", *_PHASES, "at the end", "peak, bytes per parameter"]
    common.report("Peak memory of one rank", columns, rows, path)


if __name__ == "__main__":
    main()
