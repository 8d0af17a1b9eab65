"""The model, batch and texts that every arm of step_speed.py trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = 512  # tokens in a row
ROWS = 4  # of a global step
VOCABULARY = 8192
SIZES: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "tie_word_embeddings": True,
}  # 13.8M parameters
CLIP, LR = 1.0, 1e-3


def write_manifest(folder: Path, rows: int) -> Path:
    """A prepared corpus below `folder` whose every document fills a row exactly, so that all arms see the same shapes.

    The text is Python's standard library; a document is `LENGTH` - 1 tokens of it (the border token comes first).
    """
    from millrace.data.prepare import PrepareConfig, prepare
    from millrace.data.tokenizer import load_tokenizer, train_bpe

    texts = _modules()
    tokenizer_folder = folder / "bpe"
    if not tokenizer_folder.exists():
        train_bpe(texts, VOCABULARY).save(tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    documents: list[str] = []
    for ids in tokenizer.encode(texts):
        pieces = [ids[i : i + LENGTH - 1] for i in range(0, len(ids) - LENGTH, LENGTH - 1)]
        candidates = [tokenizer.decode(piece) for piece in pieces]
        # A cut may fall inside a character or a word that is spelt otherwise on its own.
        again = tokenizer.encode(candidates)
        documents += [text for text, new in zip(candidates, again, strict=True) if len(new) == LENGTH - 1]
        if len(documents) >= rows:
            break
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:rows]))
    out = folder / "manifest"
    prepare(PrepareConfig(inputs=[str(source)], out=str(out), tokenizer=str(tokenizer_folder), tokenize=True))
    return out


def _modules() -> list[str]:
    import sysconfig

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def model_config() -> Any:
    """The `[model]` section."""
    from millrace.models.config import ModelConfig

    return ModelConfig(kind="qwen3", config=dict(SIZES))


def plain_model() -> Any:
    """The architecture as transformers makes it, with the weights that millrace draws, for the other arms."""
    from millrace.models.bridge import build_model
    from millrace.models.config import ModelConfig

    return build_model(ModelConfig(kind="qwen3", config=dict(SIZES), attention="sdpa"), VOCABULARY, LENGTH, 0)


def rows_of(manifest: Path) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, labels aligned with them), int64 (rows, LENGTH), in the loader's order."""
    from millrace.data.config import DataConfig
    from millrace.data.loader import build_loader

    config = DataConfig(manifest=str(manifest), sequence_length=LENGTH, prefetch=0)
    inputs, labels = [], []
    with build_loader(config, seed=0, batch_rows=ROWS, micro_batch=ROWS, rank=0, world=1) as loader:
        for _ in range(64):
            (micro,) = next(loader).micro_batches
            inputs.append(micro.input_ids_BT.numpy())
            labels.append(micro.labels_BT.numpy())
    return np.concatenate(inputs), np.concatenate(labels)
