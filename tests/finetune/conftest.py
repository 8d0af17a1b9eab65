"""A small source checkpoint, and examples that a small model learns."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.handmade import small_model, small_tokenizer, write_checkpoint

NOUNS = ["river", "mill", "wheel"]


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def answers(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    chosen = [draw.choice(NOUNS) for _ in range(count)]
    return [{"prompt": f"Say {n} {i % 50}", "response": f"the {n}"} for i, n in enumerate(chosen)]


def labelled(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    chosen = [draw.choice(NOUNS) for _ in range(count)]
    verbs = ["stands", "turns", "counts"]
    return [{"text": f"The {n} {draw.choice(verbs)} by {i % 50}", "label": n} for i, n in enumerate(chosen)]


@pytest.fixture(scope="session")
def lines() -> Callable[[Path, list[Any]], Path]:
    """write(path, records): JSON lines; a string is written as it is."""
    return write_lines


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run directory `source`, `answers.jsonl` and `labelled.jsonl`."""
    folder = tmp_path_factory.mktemp("finetune")
    write_checkpoint(folder / "source" / "checkpoints", small_model("qwen3"))
    write_lines(folder / "answers.jsonl", answers(120))
    write_lines(folder / "labelled.jsonl", labelled(300))
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """The small tokenizer as transformers loads it."""
    small_tokenizer().save(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
