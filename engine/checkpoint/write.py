"""Writing a checkpoint so that a visible `step-N` is complete by construction.

Write into `step-N.tmp-…`, fsync every file and the folder; each rank writes `rank-R.json` with sizes and hashes; rank 0
writes `MANIFEST.json` last; rename to `step-N`; fsync the parent. `Saver` calls these in turn.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from millrace.core.rundir import fsync_folder
from millrace.engine.checkpoint.joint import AnyAdapter
from millrace.engine.checkpoint.tensorfile import file_sha256, write_tensors
from millrace.engine.owner import Ownership
from millrace.engine.teacher import Teacher

FORMAT = 2
ENGINE = "model"  # the main one of a run
FILE_BYTES = 4 * 2**30  # of a file at most, but for its header


@dataclass(frozen=True)
class Slice:
    """Elements from `start` on of a parameter's state, flat; `key` is `engine|parameter|state`."""

    key: str
    start: int
    values: torch.Tensor


@dataclass(frozen=True)
class Content:
    """What one rank writes: its slices; and on rank 0 what is written once, with what the manifest says."""

    rank: int
    slices: list[Slice]
    fixed: dict[str, torch.Tensor]
    extra: dict[str, Any]
    facts: dict[str, Any]


def step_name(step: int) -> str:
    """`step-00000100`."""
    return f"step-{step:08d}"


def slice_key(name: str, state: str) -> str:
    """`engine|parameter|state` of a parameter's name, which tells its engine where that is not the main one."""
    return f"{name}|{state}" if "|" in name else f"{ENGINE}|{name}|{state}"


def owned_slices(adapter: AnyAdapter) -> Iterator[Slice]:
    """Views of all that this rank writes."""
    for held in adapter.owned():
        for state, view in held.views.items():
            yield Slice(slice_key(held.name, state), held.start, view)


def facts(adapter: AnyAdapter, step: int) -> dict[str, Any]:
    """What the manifest says beside its files."""
    return {
        "format": FORMAT,
        "step": step,
        "world": adapter.world,
        "zero_stage": adapter.zero_stage,
        "optimizer_steps": adapter.step_count(),
        "states": ["master", *adapter.state_tensors()],
        "params": {n: list(getattr(p, "ds_shape", p.shape)) for n, p in adapter.named},
    }


def write_rank(temporary: Path, content: Content) -> None:
    """Write this rank's files, and on rank 0 the shared ones; each is on the disk when this returns."""
    temporary.mkdir(parents=True, exist_ok=True)
    name = f"rank-{content.rank:05d}"
    entries = []
    for number, part in enumerate(_files(content.slices)):
        path = temporary / (f"{name}-{number:05d}.safetensors" if number else f"{name}.safetensors")
        tensors = {piece.key: piece.values for piece in part}
        size, digest = _write_tensors(path, tensors)
        slices = {piece.key: [piece.start, piece.values.numel()] for piece in part}
        entries.append({"file": path.name, "size": size, "sha256": digest, "slices": slices})
    if content.rank == 0:
        _write_shared(temporary, content.fixed, content.extra)
    _write_text(temporary / f"{name}.json", json.dumps({"files": entries}))


def _files(slices: list[Slice]) -> Iterator[list[Slice]]:
    """Share the slices out to files of `FILE_BYTES` at most; one that does not fit is cut."""
    part: list[Slice] = []
    room = FILE_BYTES
    for whole in slices:
        start, size, total = 0, whole.values.element_size(), whole.values.numel()
        while start < total:
            if room < size:
                yield part
                part, room = [], FILE_BYTES
            count = min(total - start, room // size)
            part.append(Slice(whole.key, whole.start + start, whole.values.narrow(0, start, count)))
            start, room = start + count, room - count * size
    yield part


def _write_shared(temporary: Path, fixed: dict[str, torch.Tensor], extra: dict[str, Any]) -> None:
    """Frozen parameters and buffers once, in their dtype, and the files beside the weights."""
    _write_tensors(temporary / "fixed.safetensors", fixed)
    for name, text in extra.get("files", {}).items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        _write_text(temporary / name, text)
    for name, content in extra.items():
        if name != "files":
            _write_text(temporary / f"{name}.json", json.dumps(content))


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_tensors(path, shapes, tensors.__getitem__)


def fixed_tensors(adapter: AnyAdapter) -> dict[str, torch.Tensor]:
    """Persistent buffers and frozen parameters by name, what the optimiser does not step; call it on every rank.

    What a step may change while it is written is copied: buffers, and the parameters of a `Teacher`. Other frozen
    parameters are not, but for stage 3, where they are gathered one by one, and copied on rank 0 only.
    """
    fixed: dict[str, torch.Tensor] = {}
    for prefix, module in adapter.modules():
        fixed |= {prefix + n: b.detach().clone() for n, b in module.named_buffers() if _is_persistent(module, n)}
        moving = {id(p) for part in module.modules() if isinstance(part, Teacher) for p in part.parameters()}
        for name, param in module.named_parameters():
            if not param.requires_grad:
                fixed |= _frozen(prefix + name, param, copies=id(param) in moving, main=adapter.rank == 0)
    return fixed


def _frozen(name: str, param: torch.nn.Parameter, *, copies: bool, main: bool) -> dict[str, torch.Tensor]:
    """A frozen parameter by its name; nothing on other ranks where it is partitioned."""
    if not hasattr(param, "ds_id"):
        return {name: param.detach().clone() if copies else param.detach()}
    import deepspeed

    with deepspeed.zero.GatheredParameters([param]):
        return {name: param.detach().cpu().clone()} if main else {}


def _is_persistent(module: torch.nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf not in module.get_submodule(owner)._non_persistent_buffers_set


def commit(temporary: Path, final: Path, content: Content, owner: Ownership | None) -> int:
    """Rank 0, when all ranks have written: make the checkpoint visible, and return its size in bytes.

    The `owner` of the run directory looks again whether it still is one.
    """
    ranks = [json.loads((temporary / f"rank-{r:05d}.json").read_text()) for r in range(content.facts["world"])]
    known = {f["file"]: {"size": f["size"], "sha256": f["sha256"]} for entry in ranks for f in entry["files"]}
    files = {
        str(p.relative_to(temporary)): known.get(p.name) or {"size": p.stat().st_size, "sha256": file_sha256(p)}
        for p in sorted(temporary.rglob("*"))
        if p.is_file()
    }
    manifest = content.facts | {"files": files}
    _write_text(temporary / "MANIFEST.json", json.dumps(manifest | {"sha256": manifest_sha256(manifest)}, indent=1))
    for folder in [p for p in temporary.rglob("*") if p.is_dir()]:
        fsync_folder(folder)
    fsync_folder(temporary)
    if owner is not None:
        owner.check()
    if final.exists():  # the same step again, after falling back to an older checkpoint
        remove(final)
    os.rename(temporary, final)
    fsync_folder(final.parent)
    return sum(file["size"] for file in files.values())


def manifest_sha256(manifest: dict[str, Any]) -> str:
    """The hash that a manifest holds of all else in it, so that a bit that flips in it is found, too."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


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
