"""Checkpoints of two ranks that one process writes, without an engine."""

from __future__ import annotations

from pathlib import Path

import torch

from millrace.engine.checkpoint.write import FORMAT, Content, Slice, commit, step_name, write_rank

RANKS = 2


def content(step: int, rank: int) -> Content:
    """What a rank of a model with three layers would write."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    slices = [Slice(f"model|layer{n}|{s}", rank * 8, torch.randn(8, generator=generator))
              for n in range(3) for s in ("master", "exp_avg")]  # fmt: skip
    params = {f"layer{n}": [8 * RANKS] for n in range(3)}
    facts = {"format": FORMAT, "step": step, "world": RANKS, "params": params, "states": ["master", "exp_avg"]}
    files = {"config.toml": "x = 1\n", "model/config.json": "{}"}
    return Content(rank, slices, {"buffer": torch.ones(3)}, {"trainer": {"step": step}, "files": files}, facts)


def save(folder: Path, step: int, order: tuple[int, ...] = (0, 1)) -> Path:
    """Write `step-N` as a run would, its ranks one after the other."""
    temporary, final = folder / f"{step_name(step)}.tmp-1", folder / step_name(step)
    for rank in order:
        write_rank(temporary, content(step, rank))
    commit(temporary, final, content(step, 0), None)
    return final
