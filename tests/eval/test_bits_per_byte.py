"""Bits per byte against a loop over single tokens, and against the training's own held-out figure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.data.packing import cut
from millrace.data.prepare import PrepareConfig, prepare
from millrace.eval.bits_per_byte import bits_per_byte, read_documents, windows
from millrace.eval.subject import Subject, open_subject
from tests.handmade import TEXT, small_model, write_checkpoint

DOCUMENTS = [TEXT[0], TEXT[1] * 9, "é", TEXT[2] * 3, "", TEXT[0] * 5]


def pairs(texts: list[str]) -> list[tuple[str, int]]:
    return [(text, len(text.encode())) for text in texts]


@torch.no_grad()
def one_by_one(subject: Subject, text: str, stride: int) -> tuple[float, int]:
    """Every token predicted alone, from the tokens of its window before it: (nats, predictions)."""
    tokenizer = subject.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode([text])[0].tolist(), tokenizer.eos_id]
    nats = 0.0
    for target in range(1, len(ids)):
        window = max(0, math.ceil((target - subject.context) / stride)) * stride
        seen = torch.tensor([ids[window:target]])
        logits = subject.model(input_ids=seen, use_cache=False).logits[0, -1].double()
        nats -= float(torch.log_softmax(logits, -1)[ids[target]])
    return nats, len(ids) - 1


@pytest.mark.parametrize("stride", [None, 16, 1])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_token_by_token(subject: Subject, stride: int | None, batch: int) -> None:
    texts = DOCUMENTS if stride != 1 else [TEXT[0] * 3, "é"]
    found = bits_per_byte(subject, pairs(texts), batch=batch, stride=stride)
    expected = [one_by_one(subject, text, stride or subject.context) for text in texts]
    assert found.tokens == sum(n for _, n in expected) and found.documents == len(texts)
    assert found.tokens > subject.context * 1.2, "no document is longer than the context"
    assert found.nats == pytest.approx(sum(nats for nats, _ in expected), rel=1e-6)
    assert found.bytes == len("".join(texts).encode())
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.bytes)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_other_families_and_padding(kind: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, small_model(kind))
    subject = open_subject(path, dtype="fp32")
    found = bits_per_byte(subject, pairs(DOCUMENTS[:3]), batch=3)
    assert found.nats == pytest.approx(sum(one_by_one(subject, t, 64)[0] for t in DOCUMENTS[:3]), rel=1e-6)


@given(st.integers(1, 300), st.integers(1, 64), st.data())
def test_windows_count_every_position_once(positions: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    counted: list[int] = []
    for start, end, first in windows(positions, context, stride):
        assert start <= first < end <= start + context
        assert first == 0 or first - start >= context - stride
        counted += range(first, end)
    assert counted == list(range(positions))


def test_cut_as_in_training() -> None:
    spans = cut(np.array([150, 64, 3]), 64)
    for slot, positions in enumerate((150, 64, 3)):
        expected = [(start, end) for number, start, end in spans.tolist() if number == slot]
        assert [(start, end) for start, end, _ in windows(positions, 64, 64)] == expected


def test_sources_agree(subject: Subject, tmp_path: Path) -> None:
    """The same documents as text files, JSON lines, a folder of both, and a manifest."""
    texts = [t for t in DOCUMENTS if t]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(texts[:2]):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / "rest.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[2:]))
    subject.tokenizer.save(tmp_path / "tokenizer")
    config = {"inputs": [str(folder)], "tokenizer": str(tmp_path / "tokenizer")}
    prepare(PrepareConfig(**config, out=str(tmp_path / "plain")))
    prepare(PrepareConfig(**config, out=str(tmp_path / "tokens"), tokenize=True))
    expected = bits_per_byte(subject, pairs(texts))
    for path in (folder, tmp_path / "plain", tmp_path / "tokens" / "manifest.json"):
        found = bits_per_byte(subject, read_documents(path, subject.tokenizer))
        assert (found.tokens, found.bytes, found.documents) == (expected.tokens, expected.bytes, expected.documents)
        assert found.nats == pytest.approx(expected.nats, rel=1e-6)


def test_bad_input(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Müller".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.txt, document 0: not UTF-8 at byte 1"):
        list(read_documents(tmp_path / "latin.txt", subject.tokenizer))
    with pytest.raises(UserError, match="no input '.*nothing.txt'"):
        list(read_documents(tmp_path / "nothing.txt", subject.tokenizer))
    with pytest.raises(UserError, match="there is no text to evaluate"):
        bits_per_byte(subject, [("", 0)])
    with pytest.raises(UserError, match="a stride of 65 tokens: give 1 to 64"):
        bits_per_byte(subject, pairs(TEXT), stride=65)
