"""Reading checkpoints: verify, fall back to the newest good one, and load any stage and world size from any other."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from millrace.core.console import warn
from millrace.core.errors import UserError
from millrace.engine.checkpoint.joint import AnyAdapter
from millrace.engine.checkpoint.slices import MASTER
from millrace.engine.checkpoint.tensorfile import file_sha256
from millrace.engine.checkpoint.write import FORMAT, manifest_sha256, slice_key
from millrace.engine.distributed import World

UNSEALED = 1  # the format of 0.1, whose manifest holds no hash of itself


class Checkpoint:
    """A `step-N` folder. Tensors are read in slices; nothing is held in memory longer than asked for."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self.manifest: dict[str, Any] = json.loads((self.path / "MANIFEST.json").read_text())
        except FileNotFoundError:
            raise UserError(f"{self.path} is not a checkpoint: it has no MANIFEST.json") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}/MANIFEST.json cannot be read: {error}") from None
        found = self.manifest.get("format")
        if found not in (UNSEALED, FORMAT):
            raise UserError(f"{self.path} has format {found}; this version reads {UNSEALED} and {FORMAT}")
        if found == FORMAT and self.manifest.pop("sha256", None) != manifest_sha256(self.manifest):
            raise UserError(f"{self.path}/MANIFEST.json was altered: its content differs from the SHA-256 in it")

    @property
    def step(self) -> int:
        """Global step after which it was written."""
        return int(self.manifest["step"])

    @cached_property
    def _index(self) -> dict[str, list[tuple[int, int, str]]]:
        """Key → (start, length, file) of every slice."""
        found: dict[str, list[tuple[int, int, str]]] = {}
        for rank in range(self.manifest["world"]):
            entry = json.loads((self.path / f"rank-{rank:05d}.json").read_text())
            for file in entry.get("files", [entry]):  # one file a rank, before 0.2
                for key, (start, length) in file["slices"].items():
                    found.setdefault(key, []).append((start, length, file["file"]))
        return found

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {}

    def _open(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self.manifest["files"]:
            raise UserError(f"{self.path} was altered: a rank's file names {name!r}, which its manifest does not list")
        if name not in self._files:
            self._files[name] = safe_open(str(self.path / name), framework="pt")
        return self._files[name]

    def read(self, param: str, state: str, start: int, length: int) -> torch.Tensor:
        """Elements [start, start + length) of a parameter's state, 1-D.

        Raises:
            UserError: the checkpoint does not hold them all.
        """
        key = slice_key(param, state)
        out: torch.Tensor | None = None
        filled = 0
        for first, count, file in self._index.get(key, []):
            low, high = max(start, first), min(start + length, first + count)
            if low < high:
                part = self._open(file).get_slice(key)[low - first : high - first]
                out = torch.empty(length, dtype=part.dtype) if out is None else out
                out[low - start : high - start] = part
                filled += high - low
        if out is None or filled != length:
            raise UserError(f"{self.path} holds {filled} of {length} elements of {key}; it fits another model")
        return out

    def master(self, param: str) -> torch.Tensor:
        """A parameter's fp32 master in its shape."""
        shape = self.manifest["params"][param]
        return self.read(param, MASTER, 0, math.prod(shape)).reshape(shape)

    def digest(self) -> str:
        """SHA-256 over every parameter's master and moments, whole, in order of names: independent of the sharding."""
        sums = hashlib.sha256()
        for name, shape in sorted(self.manifest["params"].items()):
            for state in self.manifest["states"]:
                whole = self.read(name, state, 0, math.prod(shape))
                sums.update(whole.numpy().tobytes())
        return sums.hexdigest()

    def fixed(self) -> dict[str, torch.Tensor]:
        """Frozen parameters and buffers."""
        file = self._open("fixed.safetensors")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def json(self, name: str) -> Any:
        """A JSON file of the checkpoint."""
        return json.loads((self.path / f"{name}.json").read_text())

    def text(self, name: str) -> str:
        """A text file of the checkpoint."""
        return (self.path / name).read_text(encoding="utf-8")

    def problems(self, rank: int = 0, world: int = 1) -> Iterator[str]:
        """Verify size and SHA-256 of every file; with several ranks each takes its share. Yields what is wrong."""
        for name, entry in list(self.manifest["files"].items())[rank::world]:
            path = self.path / name
            if not path.is_file():
                yield f"{name} is missing"
            elif path.stat().st_size != entry["size"]:
                yield f"{name} has {path.stat().st_size} bytes, {entry['size']} were written (torn)"
            elif file_sha256(path) != entry["sha256"]:
                yield f"{name} was altered: its SHA-256 differs from the manifest's"


def list_checkpoints(folder: Path) -> list[Path]:
    """Visible checkpoints, newest first; temporary folders are not among them."""
    found = [p for p in folder.glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def remove_leftovers(folder: Path) -> list[int]:
    """Remove what a kill left behind; call it on one rank before the run starts writing.

    Returns:
        The steps whose save was cut off.
    """
    unfinished = []
    for path in sorted(folder.glob("step-*.tmp-*")):
        shutil.rmtree(path, ignore_errors=True)
        step, _, owner = path.name[5:].partition(".tmp-")
        if step.isdigit() and owner.isdigit():  # not one that was being removed
            unfinished.append(int(step))
    return unfinished


def open_newest(folder: Path, world: World | None = None) -> tuple[Checkpoint | None, list[dict[str, str]]]:
    """The newest checkpoint that verifies, and what was rejected on the way (path and why).

    None only when `folder` has no checkpoint at all: never a silent start from step 0.

    Raises:
        UserError: there are checkpoints and none verifies.
    """
    rejected: list[dict[str, str]] = []
    for path in list_checkpoints(folder):
        why = verdict(path, world)
        if not why:
            return Checkpoint(path), rejected
        rejected.append({"path": str(path), "why": why})
        if world is None or world.main:
            warn(f"checkpoint {path} is not used: {why}")
    if rejected:
        raise UserError(
            f"no checkpoint in {folder} verifies ({rejected[0]['path']}: {rejected[0]['why']}). Restore one from a "
            "copy, or start a new run with another run.name; this run does not start over in silence"
        )
    return None, []


def open_before(folder: Path, step: int, world: World) -> Checkpoint | None:
    """The newest checkpoint that verifies and whose weights are older than those after `step`; call it on every rank.

    A checkpoint written while steps were not taken holds the weights of the last that was.
    """
    for path in list_checkpoints(folder):
        if verdict(path, world):
            continue
        found = Checkpoint(path)
        if found.json("trainer").get("guard", {}).get("taken", found.step) < step:
            return found
    return None


def open_verified(path: Path, world: World | None = None) -> Checkpoint:
    """A checkpoint given by name (`step-N`, or a run directory for its newest), verified.

    Raises:
        UserError: it is missing, torn or altered.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        found, _ = open_newest(path / "checkpoints", world)
        if found is None:
            raise UserError(f"{path} has no checkpoint yet")
        return found
    if not path.is_dir():
        raise UserError(f"no checkpoint {path}: give a run directory or one of its checkpoints/step-N folders")
    if why := verdict(path, world):
        raise UserError(f"checkpoint {path} is not used: {why}")
    return Checkpoint(path)


def verdict(path: Path, world: World | None = None) -> str:
    """Why a checkpoint is not to be used, empty where it verifies; with a world each rank hashes its share of files."""
    try:
        mine = list(Checkpoint(path).problems(world.rank if world else 0, world.size if world else 1))
    except UserError as error:
        mine = [str(error)]
    everyone = world.gather_objects(mine) if world else [mine]
    return "; ".join(dict.fromkeys(p for part in everyone for p in part))


@torch.no_grad()
def load_checkpoint(checkpoint: Checkpoint, adapter: AnyAdapter) -> None:
    """Load masters, moments, step count, buffers and frozen parameters into an engine; call it on every rank.

    Raises:
        UserError: the checkpoint is of another model (a name or a shape differs).
    """
    here = {n: list(getattr(p, "ds_shape", p.shape)) for n, p in adapter.named}
    there = checkpoint.manifest["params"]
    if here != there:
        odd = sorted(n for n in here.keys() | there.keys() if here.get(n) != there.get(n))
        name = odd[0]
        raise UserError(
            f"{checkpoint.path} fits another model: {name} is {there.get(name)} there and {here.get(name)} here"
        )
    adapter.allocate()
    for held in adapter.held():
        for state, view in held.views.items():
            view.copy_(checkpoint.read(held.name, state, held.start, held.length))
    adapter.set_step_count(checkpoint.manifest["optimizer_steps"])
    _load_fixed(checkpoint, adapter)
    adapter.push()


def _load_fixed(checkpoint: Checkpoint, adapter: AnyAdapter) -> None:
    import deepspeed

    saved = checkpoint.fixed()
    for prefix, module in adapter.modules():
        for name, param in module.named_parameters():
            if not param.requires_grad:
                with deepspeed.zero.GatheredParameters([param], modifier_rank=0, enabled=hasattr(param, "ds_id")):
                    if adapter.rank == 0 or not hasattr(param, "ds_id"):
                        param.copy_(saved[prefix + name])
        for name, buffer in module.named_buffers():
            if prefix + name in saved:
                buffer.copy_(saved[prefix + name])


@torch.no_grad()
def digest(adapter: AnyAdapter, world: World) -> str:
    """What `Checkpoint.digest` would be of the engine's present state; equal on every rank."""
    sums = hashlib.sha256()
    owned = {held.name: held for held in adapter.owned()}
    states = [MASTER, *adapter.state_tensors()]
    for name, param in sorted(adapter.named):
        for state in states:
            whole = torch.zeros(getattr(param, "ds_numel", param.numel()), device=world.device)
            if name in owned:
                held = owned[name]
                whole[held.start : held.start + held.length] = held.views[state]
            torch.distributed.all_reduce(whole)
            sums.update(whole.cpu().numpy().tobytes())
    return sums.hexdigest()
