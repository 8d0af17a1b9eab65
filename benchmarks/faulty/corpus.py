"""The text, model and batch that both arms train: Python's library in rows of equal length, tokenised once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = 128  # positions in a row
BATCH = 16  # rows of a global step
VOCABULARY = 4096
ROWS = 24_000  # at most; a multiple of the batch, so that no step of an epoch is shorter than the others
LEARNING_RATE, CLIP = 3e-4, 1.0
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True,
}  # 4.3M parameters  # fmt: skip


def write(folder: Path) -> None:
    """`folder/manifest` for millrace, and `folder/rows.npy` (rows, LENGTH) with the same samples for the other arm.

    A sample is LENGTH - 1 tokens and fills a row (the border token comes first), so that packing has nothing to do and
    both arms see the same rows.
    """
    from millrace.data.prepare import PrepareConfig, prepare
    from millrace.data.tokenizer import load_tokenizer, train_bpe
    from millrace.launch.demo.corpus import read_modules, standard_library

    texts = [module.text for module in read_modules(standard_library())]
    train_bpe(texts, VOCABULARY).save(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    pieces = [
        ids[i : i + LENGTH - 1] for ids in tokenizer.encode(texts) for i in range(0, len(ids) - LENGTH, LENGTH - 1)
    ]
    candidates = [tokenizer.decode(piece) for piece in pieces]
    # A cut may fall inside a character or a word that is spelt otherwise on its own.
    kept = [(t, ids) for t, ids in zip(candidates, tokenizer.encode(candidates), strict=True) if len(ids) == LENGTH - 1]
    kept = kept[: min(ROWS, len(kept) // BATCH * BATCH)]
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in kept))
    made = str(folder / "manifest")
    prepare(PrepareConfig(inputs=[str(source)], out=made, tokenizer=str(folder / "tokenizer"), tokenize=True))
    rows = np.array([[tokenizer.bos_id, *ids] for _, ids in kept], np.uint16)
    np.save(folder / "rows.npy", rows)
