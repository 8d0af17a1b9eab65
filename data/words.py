"""Token ids of words, remembered: most of a text is words that were met before.

A byte-level BPE cuts a text into pieces by a regular expression and tokenises every piece by itself. The expressions in
use never join what stands before a single space with what follows it, so a text can be cut there, and the ids of each
part looked up. They are what the tokenizer itself gives for the whole text, several times as fast.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

_CUT = re.compile(r"(?<=\S)(?= \S)")
_MOST = 2**22  # characters that are remembered, and 16 for each word: about 50 MB; then all is forgotten
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# Expressions of `Split`, of which it was made sure that no piece holds a single space but at its start.
_EXPRESSIONS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    _CL100K.replace("NUMBERS", "{1,3}"),  # cl100k_base, Llama 3
    _CL100K.replace("NUMBERS", ""),  # Qwen 2 and 3
)


class Words:
    """Encodes texts by their words; callable from several threads at once."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """`backend` must be one of which `cuts_at_spaces` is true."""
        self._backend = backend
        self._known: dict[str, bytes] = {}
        self._size = 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (int32, shape (n,), not writable) of each text, without border tokens."""
        if self._size > _MOST:
            self._known, self._size = {}, 0  # another thread may still be using the old one
        known = self._known
        parts = [_CUT.split(text) for text in texts]
        new = list({word for words in parts for word in words if word not in known})
        encodings = self._backend.encode_batch_fast(new, add_special_tokens=False)
        known.update((word, np.array(one.ids, np.int32).tobytes()) for word, one in zip(new, encodings, strict=True))
        self._size += sum(map(len, new)) + 16 * len(new)
        return [np.frombuffer(b"".join(map(known.__getitem__, words)), np.int32) for words in parts]


def cuts_at_spaces(spec: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json describes a tokenizer that never joins what a single space divides."""
    normalizer, model = spec.get("normalizer") or {}, spec.get("model") or {}
    return (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and normalizer.get("type", "NFC") == "NFC"  # a space never composes with what stands before it
        and _cuts(spec.get("pre_tokenizer") or {})
        and all(_plain(token) for token in spec.get("added_tokens") or ())
    )


def _cuts(pre: Mapping[str, Any]) -> bool:
    if pre.get("type") == "Sequence":
        split, *rest = pre.get("pretokenizers") or [{}]
        known = split.get("type") == "Split" and split.get("pattern", {}).get("Regex") in _EXPRESSIONS
        known = known and split.get("behavior") == "Isolated" and not split.get("invert")
        return known and len(rest) == 1 and _byte_level(rest[0]) and not rest[0].get("use_regex", True)
    return _byte_level(pre) and bool(pre.get("use_regex", True))


def _byte_level(pre: Mapping[str, Any]) -> bool:
    return pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space", True)


def _plain(token: Mapping[str, Any]) -> bool:
    """Whether an added token is found in a word as it is in the text; special ones are not looked for at all."""
    within = not any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word"))
    return bool(token.get("special")) or (within and not re.search(r"\s", token.get("content", " ")))
