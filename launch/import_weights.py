"""`millrace checkpoint import`: pickled weights of others into safetensors, where the user trusts who made them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millrace.core.console import say, warn
from millrace.core.errors import UserError
from millrace.launch.arguments import Parser

# Where others keep the weights in what they pickled.
_INSIDE = ("state_dict", "model_state_dict", "model", "module")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")


def main(argv: Sequence[str]) -> int:
    """Convert, if --trust-pickle is given."""
    parser = Parser(
        prog="millrace checkpoint import",
        description="Write pickled weights (.pt, .pth, .bin, .ckpt, or a folder of transformers that holds such) as "
        "safetensors. Reading a pickle runs whatever code it holds, as you: it needs --trust-pickle, and nothing else "
        "in millrace reads one.",
        epilog="example: millrace checkpoint import downloaded/model.pt weights/ --trust-pickle",
    )
    parser.add_argument("source", help="a file, or a folder with pytorch_model*.bin and config.json")
    parser.add_argument("out", help="folder for model.safetensors; it must not exist")
    parser.add_argument("--trust-pickle", action="store_true", help="you trust who made it to run code as you")
    options = parser.parse_args(list(argv))
    written = import_weights(Path(options.source), Path(options.out), options.trust_pickle)
    say(f"written: {written}")
    return 0


def import_weights(source: Path, out: Path, trust_pickle: bool) -> Path:
    """Write `out/model.safetensors`, with a folder's JSON files beside it; returns its path.

    Raises:
        UserError: not trusted, nothing pickled there, nothing that is weights inside, or `out` is there already.
    """
    from safetensors.torch import save_file

    if out.exists():
        raise UserError(f"{out} is there already; give a folder that does not exist")
    files = _files(source)
    if not trust_pickle:
        raise UserError(
            f"{files[0]} is a pickle: reading it runs any code that it holds, as you. If you trust who made it, add "
            "--trust-pickle; better, ask for safetensors"
        )
    tensors: dict[str, Any] = {}
    for file in files:
        tensors |= _unpickle(file)
    out.mkdir(parents=True)
    path = out / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    for extra in source.glob("*.json") if source.is_dir() else ():
        if not extra.name.endswith(".index.json"):
            shutil.copy2(extra, out / extra.name)
    return path


def _files(source: Path) -> list[Path]:
    found = sorted(p for p in source.glob("*") if p.suffix in _PICKLES) if source.is_dir() else [source]
    if not found or not found[0].is_file():
        raise UserError(f"{source}: no such file, or a folder without any of *{', *'.join(_PICKLES)}")
    return found


def _unpickle(file: Path) -> dict[str, Any]:
    """Name → tensor, each with memory of its own."""
    import torch

    warn(f"unpickling {file} (SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()}), as --trust-pickle allows")
    content = torch.load(file, map_location="cpu", weights_only=False)
    for key in _INSIDE:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__}, not weights by name; save model.state_dict()")
    found = {str(name): value for name, value in content.items() if torch.is_tensor(value)}
    if not found:
        raise UserError(f"{file} holds no tensor by name; its keys are {', '.join(map(str, list(content)[:8]))}")
    return {name: value.detach().clone().contiguous() for name, value in found.items()}
