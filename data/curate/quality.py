"""Quality heuristics: the rules of Gopher (Rae et al. 2021, arXiv:2112.11446, section A.1.1, Table A1).

datatrove's filters decide, with the published thresholds. They do not say by how much a document failed, so the value
is measured once more for the documents that are removed. Chosen for all languages alike: the rule that wants English
stop words is off, and the length of words is not judged in scripts that are written without spaces.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from datatrove.data import Document
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.gopher_repetition_filter import (
    find_all_duplicate,
    find_duplicates,
    find_top_duplicate,
    get_n_grams,
)
from datatrove.utils.text import PUNCTUATION_SET, split_into_parts, split_into_words

from millrace.data.curate.words import WORDS, is_unspaced

_LARGE = 2**20  # datatrove keeps the words of the last five texts; not those of large ones
TOP_NGRAMS = ((2, 0.2), (3, 0.18), (4, 0.16))
DUPLICATE_NGRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))


@dataclass(frozen=True)
class Rule:
    """A document is removed where `measure(text)` is below the limit, or above it."""

    what: str
    below: bool
    limit: float
    measure: Callable[[str], float]

    def __str__(self) -> str:
        return f"{self.what} {'<' if self.below else '>'} {self.limit:g}"


def _words(text: str) -> list[str]:
    return list(split_into_words(text, WORDS))


def _proper(text: str) -> list[str]:
    return [word for word in _words(text) if any(letter not in PUNCTUATION_SET for letter in word)]


def _mean_length(text: str) -> float:
    words = _proper(text)
    return sum(map(len, words)) / len(words)


def _per_word(text: str, *marks: str) -> float:
    return sum(map(text.count, marks)) / len(_words(text))


def _share(items: list[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, items)) / len(items)


def _lines(text: str) -> list[str]:
    return re.split(r"\n+", text)


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n{2,}", text.strip())


def _top(n: int) -> Callable[[str], float]:
    return lambda text: find_top_duplicate(get_n_grams(_words(text), n)) / len(text)


def _repeated(n: int) -> Callable[[str], float]:
    return lambda text: find_all_duplicate(_words(text), n) / len(text)


def _has_letter(word: str) -> bool:
    return any(map(str.isalpha, word))


def _bullet(line: str) -> bool:
    return line.lstrip().startswith(("•", "-"))


def _ellipsis(line: str) -> bool:
    return line.rstrip().endswith(("...", "…"))


RULES = {
    "short_doc": Rule("words", True, 50, lambda t: len(_proper(t))),
    "long_doc": Rule("words", False, 100_000, lambda t: len(_proper(t))),
    "below_avg_threshold": Rule("mean letters of a word", True, 3, _mean_length),
    "above_avg_threshold": Rule("mean letters of a word", False, 10, _mean_length),
    "too_many_hashes": Rule("'#' per word", False, 0.1, lambda t: _per_word(t, "#")),
    "too_many_ellipsis": Rule("ellipses per word", False, 0.1, lambda t: _per_word(t, "...", "…")),
    "too_many_bullets": Rule("lines with a bullet", False, 0.9, lambda t: _share(t.splitlines(), _bullet)),
    "too_many_end_ellipsis": Rule(
        "lines that end in an ellipsis", False, 0.3, lambda t: _share(t.splitlines(), _ellipsis)
    ),
    "below_alpha_threshold": Rule("words with a letter", True, 0.8, lambda t: _share(_words(t), _has_letter)),
    "dup_para_frac": Rule(
        "paragraphs that repeat", False, 0.3, lambda t: find_duplicates(_paragraphs(t))[0] / len(_paragraphs(t))
    ),
    "dup_para_char_frac": Rule(
        "characters in repeated paragraphs", False, 0.2, lambda t: find_duplicates(_paragraphs(t))[1] / len(t)
    ),
    "dup_line_frac": Rule("lines that repeat", False, 0.3, lambda t: find_duplicates(_lines(t))[0] / len(_lines(t))),
    "dup_line_char_frac": Rule(
        "characters in repeated lines", False, 0.2, lambda t: find_duplicates(_lines(t))[1] / len(t)
    ),
    **{
        f"top_{n}_gram": Rule(f"characters in the most frequent {n}-gram", False, limit, _top(n))
        for n, limit in TOP_NGRAMS
    },
    **{
        f"duplicated_{n}_n_grams": Rule(f"characters in repeated {n}-grams", False, limit, _repeated(n))
        for n, limit in DUPLICATE_NGRAMS
    },
}
"""By datatrove's names of the rules, without "gopher_"."""


@dataclass(frozen=True)
class _Filters:
    spaced: GopherQualityFilter
    unspaced: GopherQualityFilter
    repetition: GopherRepetitionFilter


@cache
def _filters() -> _Filters:
    limits = {
        "min_doc_words": RULES["short_doc"].limit,
        "max_doc_words": RULES["long_doc"].limit,
        "min_avg_word_length": RULES["below_avg_threshold"].limit,
        "max_avg_word_length": RULES["above_avg_threshold"].limit,
        "max_symbol_word_ratio": RULES["too_many_hashes"].limit,
        "max_bullet_lines_ratio": RULES["too_many_bullets"].limit,
        "max_ellipsis_lines_ratio": RULES["too_many_end_ellipsis"].limit,
        "max_non_alpha_words_ratio": RULES["below_alpha_threshold"].limit,
        "min_stop_words": None,
        "language": WORDS,
    }
    names = ("dup_line_frac", "dup_para_frac", "dup_line_char_frac", "dup_para_char_frac")
    return _Filters(
        spaced=GopherQualityFilter(**limits),
        unspaced=GopherQualityFilter(**limits | {"min_avg_word_length": None}),
        repetition=GopherRepetitionFilter(
            **{name: RULES[name].limit for name in names},
            top_n_grams=TOP_NGRAMS,
            dup_n_grams=DUPLICATE_NGRAMS,
            language=WORDS,
        ),
    )


def judge(text: str) -> tuple[str, float] | None:
    """(the rule that removes the text, the value that it measured), or None for a text that is kept.

    Lines are judged without the white space around them: datatrove takes blank lines that hold a space for repetitions.
    """
    text = "\n".join(map(str.strip, text.splitlines())).strip()
    filters, words = _filters(), _words(text)
    unspaced = not text.isascii() and 2 * sum(map(is_unspaced, words)) > len(words)
    document = Document(text=text, id="")
    found = None
    for filter in (filters.unspaced if unspaced else filters.spaced, filters.repetition):
        verdict = filter.filter(document)
        if verdict is not True:
            rule = verdict[1].removeprefix("gopher_")
            found = rule, float(RULES[rule].measure(text))
            break
    if len(text) > _LARGE:
        split_into_parts.cache_clear()
    return found
