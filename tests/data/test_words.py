"""Encoding by words against the tokenizer itself."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from millrace.data import words as module
from millrace.data.tokenizer import Tokenizer, train_bpe
from millrace.data.words import Words, cuts_at_spaces

TEXTS = [path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]


def spec(split: str | None = None, **changes: Any) -> dict[str, Any]:
    """A BPE of the library's sources, cut by GPT-2's expression in ByteLevel, or by `split` before it."""
    backend = train_bpe(TEXTS, 700).backend
    if split:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), byte_level])
    return dict(json.loads(backend.to_str())) | changes


SPECS = {
    "byte level": spec(),
    "NFC": spec(normalizer={"type": "NFC"}),
    **{f"expression {number}": spec(one) for number, one in enumerate(module._EXPRESSIONS)},
}


def both(plain: dict[str, Any]) -> tuple[Tokenizer, Words]:
    assert cuts_at_spaces(plain)
    tokenizer = Tokenizer(plain, {}, "it")
    return tokenizer, Words(tokenizer.backend)


PAIRS = {name: both(plain) for name, plain in SPECS.items()}
PIECES = st.sampled_from(
    [" ", "  ", "\n", " \n", "\t", "\u00a0", "\u2003", "\u3000", "\x1c", "\x85", "a", "Ab", "'s", "'LL", "12", "3456",
     "é", "e\u0301", "\u0301", "́", "ſ", "漢字", "!?", "...", "<|endoftext|>", "_", "٣", "🙂", "\u200d",
     "\u200b", "\ufeff"]
)  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=150)
@given(texts=st.lists(st.one_of(st.lists(PIECES).map("".join), st.text()), max_size=4))
def test_ids_are_the_tokenizers(name: str, texts: list[str]) -> None:
    tokenizer, words = PAIRS[name]
    for one, other in zip(tokenizer.encode(texts), words.encode(texts), strict=True):
        assert one.tolist() == other.tolist() and other.dtype == np.int32


@pytest.mark.parametrize("name", SPECS)
def test_ids_of_whole_files_from_many_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 20_000)  # forgotten again and again
    tokenizer, words = PAIRS[name]
    draw = random.Random(0)
    parts = [draw.sample(TEXTS, 2) for _ in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(words.encode, parts))
    for part, one in zip(parts, found, strict=True):
        assert [ids.tolist() for ids in one] == [ids.tolist() for ids in tokenizer.encode(part)]
    assert words._size < 20_000 + 4 * sum(2 * len(text) + 16 * len(text) for text in TEXTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": None},
        {"model": SPECS["byte level"]["model"] | {"dropout": 0.1}},
        {"added_tokens": [*SPECS["byte level"]["added_tokens"], {"content": "New York", "special": False}]},
        {"added_tokens": [{"content": "tok", "special": False, "lstrip": True}]},
    ],
)
def test_others_are_encoded_whole(changes: dict[str, Any]) -> None:
    assert not cuts_at_spaces(SPECS["byte level"] | changes)


def test_other_expressions_are_encoded_whole() -> None:
    assert not cuts_at_spaces(spec(r"\p{L}+ \p{L}+|\s+|."))
    tokenizer = Tokenizer(spec(r"\p{L}+ \p{L}+|\s+|."), {}, "it")
    assert tokenizer._words is None
    assert tokenizer.encode_words(["a b"])[0].tolist() == tokenizer.encode(["a b"])[0].tolist()


def test_an_added_token_within_a_word_is_found() -> None:
    backend = tokenizers.Tokenizer.from_str(json.dumps(SPECS["byte level"]))
    backend.add_tokens(["<tool>"])
    tokenizer, words = both(json.loads(backend.to_str()))
    text = "call <tool> or x<tool>y <tool><tool> <tool"
    assert words.encode([text])[0].tolist() == tokenizer.encode([text])[0].tolist()
    assert (words.encode([text])[0] == tokenizer.vocab_size - 1).sum() == 4
