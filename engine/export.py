"""From a checkpoint to a folder that `from_pretrained` loads, one tensor in memory at a time.

Any ZeRO stage and world size may have written the checkpoint. The layout is that of `save_pretrained`, fused
experts split again included; no code travels with it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from millrace.core.errors import UserError
from millrace.core.rundir import fsync_folder, write_atomic
from millrace.data.tokenizer import load_tokenizer
from millrace.engine.checkpoint.tensorfile import write_tensors
from millrace.engine.trained import Trained

MARK = "millrace.json"
VIEW = "view.json"
FORMAT = "millrace-export"
# Files of a checkpoint below this folder belong to an export as well. One that holds a config.json is a model of its
# own, whose tensors the checkpoint keeps, fixed, by the name of the folder with dots.
BESIDE = "beside/"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Summary:
    """What was written; also the content of `millrace.json` in the folder."""

    path: str
    source: dict[str, Any]
    dtype: str
    parameters: int
    bytes: int  # of the weights
    files: list[str]


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: its name in the file, and the model's tensor that it is made from."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    made_from: str

    @property
    def size(self) -> int:
        """In bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def export(
    source: str | Path, out: str | Path, dtype: Literal["fp32", "bf16"] = "fp32", max_shard: int = 5 * 10**9
) -> Summary:
    """Write the model of a run directory (its newest good checkpoint) or of a `step-N` folder into `out`.

    One CPU process; beside the largest tensor (a few copies of it) nothing grows with the model. `out` appears
    whole or not at all; an earlier export there is replaced. `max_shard` is the size of a weights file in bytes.

    Raises:
        UserError: a torn or altered checkpoint, an `out` that holds anything else, or a disk that is full.
    """
    target = Path(out).resolve()
    _check_free(target)
    trained = Trained.open(source)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        summary = _write(trained, temporary, target, (dtype, max_shard))
        _replace(temporary, target)
    except OSError as error:
        raise UserError(f"could not write the export {target}: {error}; free space or choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def _check_free(target: Path) -> None:
    if not target.exists() or (target / MARK).is_file() and _is_mark(target / MARK):
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; give a folder that does not exist yet")
    if any(target.iterdir()):
        raise UserError(
            f"the folder {target} is not empty and is no earlier export; give another folder, or empty it. "
            "Nothing was overwritten"
        )


def _is_mark(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("format") == FORMAT
    except (ValueError, AttributeError):
        return False


def _write(trained: Trained, folder: Path, target: Path, how: tuple[str, int]) -> Summary:
    dtype, max_shard = how
    for name, text in trained.tokenizer_files().items():
        write_atomic(folder / name, text)
    skeleton = trained.build("meta")
    _write_config(trained, skeleton, folder, DTYPES[dtype])
    pieces = plan(skeleton, DTYPES[dtype])
    size = _write_weights(pieces, _reader(trained, skeleton), folder, max_shard)
    _write_beside(trained, folder)
    summary = Summary(
        path=str(target),
        source=trained.origin(),
        dtype=dtype,
        parameters=sum(p.numel() for p in skeleton.parameters()),
        bytes=size,
        files=sorted([*(path.name for path in folder.iterdir()), MARK]),
    )
    mark = {"format": FORMAT, "version": 1, "millrace": version("millrace"), **asdict(summary)}
    write_atomic(folder / MARK, json.dumps(mark, indent=1) + "\n")
    return summary


def _write_beside(trained: Trained, folder: Path) -> None:
    for name in trained.checkpoint.manifest["files"]:
        if not name.startswith(BESIDE):
            continue
        path = folder / name.removeprefix(BESIDE)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, trained.checkpoint.text(name))
        if path.name == "config.json":
            tensors = trained.fixed(".".join(path.parent.relative_to(folder).parts) + ".")
            shapes = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
            write_tensors(path.with_name("model.safetensors"), shapes, tensors.__getitem__, {"format": "pt"})


def _write_config(trained: Trained, skeleton: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """config.json and generation_config.json as others expect them, not as the training needed them.

    For what is no model of text also view.json: how it looked at images or sounds, where the run says so.
    """
    config: PretrainedConfig = trained.config
    if getattr(skeleton, "group_normed", False):
        raise UserError(
            f"this {config.model_type} was trained with group norms in place of batch norms, which transformers cannot "
            "load; judge it with `millrace eval --probe`, or train one without batch norms, such as convnextv2"
        )
    if skeleton.main_input_name != "input_ids":
        config.architectures, config.dtype = [type(skeleton).__name__], dtype
        write_atomic(folder / "config.json", config.to_json_string())
        if view := trained.view():
            write_atomic(folder / VIEW, json.dumps(view))
        return
    borders = load_tokenizer(folder)
    pad = _pad_id(folder, borders.backend.token_to_id)
    config.architectures = [type(skeleton).__name__]
    config.dtype = dtype
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.use_cache = True
        part.bos_token_id, part.eos_token_id = borders.bos_id, borders.eos_id
        # Only a token of its own: transformers does not train the padding token's embedding, so eos must not be it.
        part.pad_token_id = pad
    write_atomic(folder / "config.json", config.to_json_string())
    generation = GenerationConfig(
        bos_token_id=borders.bos_id,
        eos_token_id=borders.eos_id,
        pad_token_id=borders.eos_id if pad is None else pad,
    )
    write_atomic(folder / "generation_config.json", generation.to_json_string())


def _pad_id(folder: Path, token_to_id: Callable[[str], int | None]) -> int | None:
    path = folder / "tokenizer_config.json"
    given = json.loads(path.read_text(encoding="utf-8")).get("pad_token") if path.is_file() else None
    name = given.get("content") if isinstance(given, dict) else given
    return token_to_id(name) if isinstance(name, str) else None


def plan(skeleton: PreTrainedModel, dtype: torch.dtype) -> list[Piece]:
    """What `save_pretrained` would write, in the model's order, each with the one tensor that it is made from.

    A layout that mixes several tensors could not be written one at a time; then the model's own names are kept,
    which transformers 5 loads as well.
    """
    parameters = {name for name, _ in skeleton.named_parameters()}
    saved = skeleton.state_dict().keys()
    tensors = {n: t for n, t in [*skeleton.named_parameters(), *skeleton.named_buffers()] if n in saved}

    def pieces(name: str, made: dict[str, torch.Tensor]) -> list[Piece]:
        floating = name in parameters and tensors[name].is_floating_point()
        return [Piece(key, dtype if floating else t.dtype, tuple(t.shape), name) for key, t in made.items()]

    plain = [piece for name, tensor in tensors.items() for piece in pieces(name, {name: tensor})]
    try:
        whole = {key: tuple(t.shape) for key, t in revert_weight_conversion(skeleton, dict(tensors)).items()}
        each = [p for n, t in tensors.items() for p in pieces(n, revert_weight_conversion(skeleton, {n: t}))]
    except Exception:  # whatever transformers' operations raise on a part of what they need
        return plain
    same = len(each) == len(whole) and whole == {piece.name: piece.shape for piece in each}
    return each if same else plain


def _reader(trained: Trained, skeleton: PreTrainedModel) -> Callable[[Piece], torch.Tensor]:
    """Reads pieces; consecutive ones of the same tensor share one reading of it."""
    held: dict[str, dict[str, torch.Tensor]] = {}

    def read(piece: Piece) -> torch.Tensor:
        if piece.made_from not in held:
            held.clear()
            tensor = trained.read(piece.made_from)
            made = {piece.made_from: tensor}
            if piece.name != piece.made_from:
                made = dict(revert_weight_conversion(skeleton, made))
            held[piece.made_from] = made
            del tensor, made
        found = held[piece.made_from].pop(piece.name)
        return found.to(piece.dtype)

    return read


def _write_weights(pieces: list[Piece], read: Callable[[Piece], torch.Tensor], folder: Path, max_shard: int) -> int:
    """model.safetensors, or several files and their index; returns the bytes of all tensors."""
    shards = _shards(pieces, max_shard)
    count, total = len(shards), sum(piece.size for piece in pieces)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        known = {piece.name: piece for piece in shard}
        shapes = {piece.name: (piece.dtype, piece.shape) for piece in shard}
        write_tensors(folder / name, shapes, lambda key, known=known: read(known[key]), {"format": "pt"})  # type: ignore[misc]
        where |= dict.fromkeys(known, name)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_atomic(folder / "model.safetensors.index.json", json.dumps(index, indent=1))
    return total


def _shards(pieces: list[Piece], max_shard: int) -> list[list[Piece]]:
    """Consecutive pieces up to `max_shard` bytes together; a larger one alone."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.size > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.size
    return shards


def _replace(temporary: Path, target: Path) -> None:
    """Put the finished folder in its place; an earlier export leaves only when the new one is whole."""
    fsync_folder(temporary)
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        os.rename(target, old)
    os.rename(temporary, target)
    fsync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
