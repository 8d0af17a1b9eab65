"""Small models, tokenizers and checkpoints of any world size, made without a process group."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from millrace.data.tokenizer import Tokenizer, train_bpe
from millrace.engine.checkpoint.tensorfile import file_sha256, write_tensors
from millrace.models.bridge import build_model
from millrace.models.config import ModelConfig

TEXT = [
    "The mill stands by the river, and the river turns the wheel.",
    "Who counts the grains? The miller counts the grains, and the mill grinds them.",
    "Water runs down the race; nothing is spilled, nothing comes twice.",
]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def small_tokenizer() -> Tokenizer:
    """A byte-level BPE of 300 tokens."""
    return train_bpe(TEXT * 4, 300)


def small_model(kind: str = "qwen3", length: int = 64, seed: int = 3, **config: Any) -> Any:
    """A model whose every weight is drawn, norms and biases too, so that a lost tensor shows."""
    names = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}}
    table = names.get(kind, SIZES) | config
    if kind in ("qwen3", "llama") and "num_key_value_heads" not in table:
        table["num_key_value_heads"] = 2
    model = build_model(ModelConfig(kind=kind, config=table), small_tokenizer().vocab_size, length, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def write_checkpoint(
    folder: Path, model: Any, tokenizer: Tokenizer | None = None, *, world: int = 2, step: int = 7, settings: str = ""
) -> Path:
    """`folder/step-N` as `world` ranks would have written it: every parameter is cut among all of them.

    `model` is one of transformers, or the module of an objective that holds one; `settings` is what the run's
    configuration says beside the length.
    """
    from millrace.engine.checkpoint.write import step_name

    start, inner = ("model.", model) if hasattr(model, "config") else ("", model.model)
    if not start:
        inner.config.architectures = [type(inner).__name__]
    path = folder / step_name(step)
    (path / "model").mkdir(parents=True)
    (tokenizer or small_tokenizer()).save(path / "tokenizer")
    (path / "model" / "config.json").write_text(inner.config.to_json_string(use_diff=False))
    (path / "config.toml").write_text(f"[data]\nsequence_length = 64\n{settings}")
    loader = {"stages": [{"manifests": ["f00d"]}], "window": 3, "packs_done": 5}
    trainer = {"step": step, "tokens": 1000 * step, "run_id": "abc", "loader": loader}
    (path / "trainer.json").write_text(json.dumps(trainer))
    params = {start + n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    fixed = {start + n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    saved = model.state_dict().keys()
    fixed |= {start + n: b for n, b in model.named_buffers() if n in saved}
    write_tensors(
        path / "fixed.safetensors", {k: (v.dtype, tuple(v.shape)) for k, v in fixed.items()}, fixed.__getitem__
    )
    for rank in range(world):
        parts = {k: (at, v) for k, at, v in _share(params, rank, world)}
        shapes = {k: (v.dtype, tuple(v.shape)) for k, (_, v) in parts.items()}
        file = path / f"rank-{rank:05d}.safetensors"
        size, sha = write_tensors(file, shapes, lambda key, parts=parts: parts[key][1])  # type: ignore[misc]
        slices = {k: [at, v.numel()] for k, (at, v) in parts.items()}
        index = {"file": file.name, "size": size, "sha256": sha, "slices": slices}
        (path / f"rank-{rank:05d}.json").write_text(json.dumps(index))
    files = {
        str(p.relative_to(path)): {"size": p.stat().st_size, "sha256": file_sha256(p)}
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }
    manifest = {
        "format": 1, "step": step, "world": world, "zero_stage": 2, "optimizer_steps": step, "states": ["master"],
        "params": {k: list(v.shape) for k, v in params.items()}, "files": files,
    }  # fmt: skip
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    return path


def add_to_checkpoint(path: Path, fixed: Mapping[str, torch.Tensor], files: Mapping[str, str]) -> None:
    """Give a checkpoint what an objective holds beside its model: fixed tensors and text files."""
    with safe_open(str(path / "fixed.safetensors"), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()} | dict(fixed)  # noqa: SIM118 (not a dict)
    shapes = {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}
    write_tensors(path / "fixed.safetensors", shapes, tensors.__getitem__)
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    for name in ("fixed.safetensors", *files):
        manifest["files"][name] = {"size": (path / name).stat().st_size, "sha256": file_sha256(path / name)}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


def _share(params: dict[str, torch.Tensor], rank: int, world: int) -> Iterator[tuple[str, int, torch.Tensor]]:
    for name, tensor in params.items():
        share = -(-tensor.numel() // world)
        part = tensor.reshape(-1)[rank * share : (rank + 1) * share]
        if part.numel():
            yield f"model|{name}|master", rank * share, part


def alter(path: Path) -> None:
    """Change the last byte of a file."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
