"""Words of a text in any script, without a model or a download, and hashes of their n-grams.

A word stands between spaces; in scripts that are written without them each character is one. datatrove's own tokenizers
need spaCy, NLTK's data or Stanza's models; it takes a custom one.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import regex
import xxhash
from datatrove.utils.text import TextNormConfig, simplify_text
from datatrove.utils.word_tokenizers import WordTokenizer

_SCRIPTS = ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")
_UNSPACED = "".join(rf"\p{{{script}}}" for script in _SCRIPTS)
_SINGLE = rf"[{_UNSPACED}]\p{{M}}*"
_BARE = regex.compile(rf"{_SINGLE}|[\w--[{_UNSPACED}]]+", regex.V1)
_BETWEEN_SPACES = regex.compile(rf"{_SINGLE}[^\w\s]*|[^\s{_UNSPACED}]+", regex.V1)
_ASCII_BARE = re.compile(r"\w+")
_FIRST_UNSPACED = regex.compile(rf"[{_UNSPACED}]", regex.V1)

# Lower case, no punctuation, no diacritics, every number as 0: FineWeb's for near duplicates. For contamination numbers
# stay, since tasks of arithmetic differ in nothing else.
_NEAR = TextNormConfig()
_EVALUATION = TextNormConfig(norm_numbers=False)


class Words(WordTokenizer):
    """Words with the punctuation that touches them: were it a word of its own, prose would fail the rule of letters."""

    def word_tokenize(self, text: str) -> list[str]:
        """All of them, in order."""
        return text.split() if text.isascii() else _BETWEEN_SPACES.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """No step uses sentences."""
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """No step uses sentences."""
        raise NotImplementedError


WORDS = Words()


def is_unspaced(word: str) -> bool:
    """Whether the word is a character of a script that is written without spaces."""
    return not word.isascii() and _FIRST_UNSPACED.match(word) is not None


def near_words(text: str) -> list[str]:
    """Words that near duplicates share: see `_NEAR`."""
    return _normalised(text, _NEAR)


def evaluation_words(text: str) -> list[str]:
    """Words that a copy of an evaluation text shares with it: lower case, no punctuation (arXiv:2005.14165, C)."""
    return _normalised(text, _EVALUATION)


def _normalised(text: str, config: TextNormConfig) -> list[str]:
    if text.isascii():  # has no diacritics, and looking for them takes most of the time
        return _ASCII_BARE.findall(simplify_text(text, replace(config, norm_unicode_diacritics=False)))
    return list(_BARE.findall(simplify_text(text, config)))


def ngram_hashes(words: list[str], n: int) -> np.ndarray:
    """Hashes of all runs of `n` words, shape (len(words) - n + 1,) or (0,), uint64.

    A polynomial in the hashes of the words modulo 2**64 (Karp and Rabin's, with words for letters).
    """
    count = max(0, len(words) - n + 1)
    single = np.fromiter((xxhash.xxh3_64_intdigest(word.encode()) for word in words), np.uint64, len(words))
    total = np.zeros(count, np.uint64)
    for shift in range(n):
        total = total * np.uint64(0x9E3779B97F4A7C15) + single[shift : shift + count]
    return total
