"""Writing a checkpoint so that a visible `step-N` is complete by construction.

Write into `step-N.tmp-…`, fsync every file and the folder; each rank writes `rank-R.json` with sizes and hashes; rank 0
writes `MANIFEST.json` last; rename to `step-N`; fsync the parent.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from millrace.core.rundir import fsync_folder
from millrace.engine.checkpoint.slices import Adapter
from millrace.engine.checkpoint.tensorfile import file_sha256, write_tensors
from millrace.engine.distributed import World
from millrace.engine.owner import Ownership

FORMAT = 1
ENGINE = "model"  # one engine now; the key keeps a place for several


def step_name(step: int) -> str:
    """`step-00000100`."""
    return f"step-{step:08d}"


def save_checkpoint(
    folder: Path, step: int, adapter: Adapter, world: World, extra: dict[str, Any], owner: Ownership | None = None
) -> int:
    """Write `folder/step-N` from all ranks and return its size in bytes; call it on every rank.

    The `owner` of the run directory looks again whether it still is one before the checkpoint becomes visible.

    `extra` holds JSON-able content by file name ("trainer": {...} → trainer.json) and, under "files", the text
    files that later stages need beside the weights ({"config.toml": "…", "model/config.json": "…"}).

    Raises:
        OSError: the disk is full or not writable; on every rank, with `step-N` not visible and the temporary
            folder removed.
    """
    final = folder / step_name(step)
    temporary = folder / f"{step_name(step)}.tmp-{owner.number if owner else 0}"
    error = _attempt(lambda: _prepare(temporary)) if world.main else None
    _raise_everywhere(world, error)
    fixed = fixed_tensors(adapter)
    error = _attempt(lambda: _write_rank(temporary, adapter, world))
    if error is None and world.main:
        error = _attempt(lambda: _write_shared(temporary, fixed, extra))
    try:
        _raise_everywhere(world, error)
        manifest = partial(_manifest, temporary, step, adapter, world)
        error = _attempt(lambda: _commit(temporary, final, manifest(), owner)) if world.main else None
        _raise_everywhere(world, error)
    except OSError:
        if world.main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return sum(f.stat().st_size for f in final.rglob("*") if f.is_file())


def _attempt(action: Any) -> str | None:
    try:
        action()
    except OSError as error:
        return f"{error}"
    return None


def _raise_everywhere(world: World, error: str | None) -> None:
    """If any rank failed, fail on all: one rank alone would leave the others waiting in a collective."""
    failed = [(rank, e) for rank, e in enumerate(world.gather_objects(error)) if e]
    if failed:
        rank, text = failed[0]
        raise OSError(f"could not write the checkpoint on rank {rank}: {text}; free space or fix the disk and rerun")


def _prepare(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_rank(temporary: Path, adapter: Adapter, world: World) -> None:
    name = f"rank-{world.rank:05d}"
    views: dict[str, torch.Tensor] = {}
    slices: dict[str, list[int]] = {}
    for held in adapter.owned():
        for state, view in held.views.items():
            key = f"{ENGINE}|{held.name}|{state}"
            views[key], slices[key] = view, [held.start, held.length]
    shapes = {k: (v.dtype, tuple(v.shape)) for k, v in views.items()}
    path = temporary / f"{name}.safetensors"
    size, digest = write_tensors(path, shapes, views.__getitem__)
    index = {"file": path.name, "size": size, "sha256": digest, "slices": slices}
    _write_text(temporary / f"{name}.json", json.dumps(index))


def _write_shared(temporary: Path, fixed: dict[str, torch.Tensor], extra: dict[str, Any]) -> None:
    """Rank 0: frozen parameters and buffers once, in their dtype, and the files beside the weights."""
    shapes = {k: (v.dtype, tuple(v.shape)) for k, v in fixed.items()}
    write_tensors(temporary / "fixed.safetensors", shapes, fixed.__getitem__)
    for name, text in extra.get("files", {}).items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        _write_text(temporary / name, text)
    for name, content in extra.items():
        if name != "files":
            _write_text(temporary / f"{name}.json", json.dumps(content))


def fixed_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Persistent buffers and frozen parameters by name, what the optimiser does not step; call it on every rank.

    Under stage 3 frozen parameters are gathered one by one, and copied on rank 0 only.
    """
    module = adapter.ds.module
    fixed = {n: b.detach() for n, b in module.named_buffers() if _is_persistent(module, n)}
    for name, param in module.named_parameters():
        if param.requires_grad:
            continue
        if not hasattr(param, "ds_id"):
            fixed[name] = param.detach()
            continue
        import deepspeed

        with deepspeed.zero.GatheredParameters([param]):
            if adapter.rank == 0:
                fixed[name] = param.detach().cpu().clone()
    return fixed


def _is_persistent(module: torch.nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf not in module.get_submodule(owner)._non_persistent_buffers_set


def _manifest(temporary: Path, step: int, adapter: Adapter, world: World) -> dict[str, Any]:
    ranks = [json.loads((temporary / f"rank-{r:05d}.json").read_text()) for r in range(world.size)]
    known = {r["file"]: {"size": r["size"], "sha256": r["sha256"]} for r in ranks}
    files = {
        str(p.relative_to(temporary)): known.get(p.name) or {"size": p.stat().st_size, "sha256": file_sha256(p)}
        for p in sorted(temporary.rglob("*"))
        if p.is_file()
    }
    return {
        "format": FORMAT,
        "step": step,
        "world": world.size,
        "zero_stage": adapter.ds.zero_optimization_stage(),
        "optimizer_steps": adapter.step_count(),
        "states": ["master", *adapter.state_tensors()],
        "params": {n: list(getattr(p, "ds_shape", p.shape)) for n, p in adapter.named},
        "files": files,
    }


def _commit(temporary: Path, final: Path, manifest: dict[str, Any], owner: Ownership | None) -> None:
    _write_text(temporary / "MANIFEST.json", json.dumps(manifest, indent=1))
    for folder in [p for p in temporary.rglob("*") if p.is_dir()]:
        fsync_folder(folder)
    fsync_folder(temporary)
    if owner is not None:
        owner.check()
    if final.exists():  # the same step again, after falling back to an older checkpoint
        shutil.rmtree(final)
    os.rename(temporary, final)
    fsync_folder(final.parent)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Remove a checkpoint, renamed first so that it is never half there."""
    doomed = path.with_name(f"{path.name}.tmp-prune")
    os.rename(path, doomed)
    shutil.rmtree(doomed)
