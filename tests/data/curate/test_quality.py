"""Each rule on a document that it alone removes; the measured values against the limits; datatrove as reference."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

from millrace.data.curate.quality import RULES, judge
from millrace.data.curate.words import WORDS, is_unspaced

# What cannot be had without another: a paragraph that repeats has lines that repeat.
ALSO = {"dup_para_char_frac": ["dup_line_char_frac"]}


def _phrases(made: SimpleNamespace, rule: str, phrases: list[str]) -> str:
    """The phrases in turn, each after other words: the longest such text that the rule still removes."""
    for between in range(60, 0, -1):
        words = made.prose(3, 12 * between * len(phrases)).lower().replace(".", "").split()
        parts = (" ".join([*words[n * between : (n + 1) * between], phrase]) for n, phrase in enumerate(phrases))
        text = " ".join(parts)
        if RULES[rule].measure(text) > RULES[rule].limit:
            return text
    raise AssertionError(rule)


def _twice(made: SimpleNamespace, space: str) -> str:
    """Ten lines of four long words twice, in another order, so that no five words repeat; and 25 short lines."""
    words = made.vocabulary
    long = [
        " ".join(a + b for a, b in zip(words[n : n + 4], words[n + 4 : n + 8], strict=True)) for n in range(0, 80, 8)
    ]
    lines = [*long, *long[::-1], *(" ".join(words[n : n + 2]) for n in range(100, 150, 2))]
    return space.join(lines)


def _make_trips(made: SimpleNamespace) -> dict[str, str]:
    prose, vocabulary = made.prose(1), made.vocabulary
    lines, words = prose.split("\n"), prose.split()
    long_words = [f"{a}{b}{c}" for a, b, c in zip(words[:40], words[40:80], words[80:120], strict=True)]
    short = [a + b for a in "abcdefghijklmnop" for b in "qrstuvwxyz"]
    random.Random(0).shuffle(short)
    grams = {n: [" ".join(vocabulary[at : at + n]) for at in range(0, 8 * n, n)] * 2 for n in range(5, 11)}
    return {
        "short_doc": " ".join(words[:49]),
        "long_doc": made.prose(2, 100_001),
        "below_avg_threshold": " ".join(short),
        "above_avg_threshold": " ".join(long_words + [w[::-1] for w in long_words]),
        "too_many_hashes": prose.replace(" ", " #", 14),
        "too_many_ellipsis": prose.replace(" ", "… ", 14),
        "too_many_bullets": "\n".join(f"- {line}" for line in lines),
        "too_many_end_ellipsis": "\n".join([line + "..." for line in lines[:4]] + lines[4:]),
        "below_alpha_threshold": prose + " " + " ".join(str(n) for n in range(1000, 1040)),
        "dup_para_frac": "\n\n".join(["Ibid."] * 10 + [made.prose(100 + n, 60) for n in range(10)]),
        "dup_para_char_frac": _twice(made, "\n\n"),
        "dup_line_frac": "\n".join(part for line in made.prose(4, 240).split("\n") for part in (line, "Ibid.")),
        "dup_line_char_frac": _twice(made, "\n"),
        "top_2_gram": _phrases(made, "top_2_gram", ["an interdisciplinarity"] * 10),
        "top_3_gram": _phrases(made, "top_3_gram", ["it is interdisciplinarity"] * 10),
        "top_4_gram": _phrases(made, "top_4_gram", ["it is an interdisciplinarity"] * 10),
        **{f"duplicated_{n}_n_grams": _phrases(made, f"duplicated_{n}_n_grams", grams[n]) for n in grams},
    }


@pytest.fixture(scope="module")
def trips(made: SimpleNamespace) -> dict[str, str]:
    return _make_trips(made)


@pytest.mark.parametrize("rule", RULES)
def test_a_document_that_one_rule_removes(rule: str, trips: dict[str, str]) -> None:
    found = judge(trips[rule])
    assert found is not None
    name, value = found
    assert name == rule
    assert _fails(rule, value)
    others = {other: RULES[other].measure(trips[rule]) for other in RULES if other != rule}
    assert [other for other, value in others.items() if _fails(other, value)] == ALSO.get(rule, [])


def _fails(rule: str, value: float) -> bool:
    return value < RULES[rule].limit if RULES[rule].below else value > RULES[rule].limit


def test_prose_passes(made: SimpleNamespace) -> None:
    assert all(judge(made.prose(seed, words)) is None for seed in range(20) for words in (60, 120, 600))


@pytest.mark.parametrize(
    ("rule", "value"), [("short_doc", 49), ("long_doc", 100_001), ("below_avg_threshold", 2), ("dup_para_frac", 9 / 20)]
)
def test_values_that_can_be_counted(rule: str, value: float, trips: dict[str, str]) -> None:
    assert judge(trips[rule]) == (rule, pytest.approx(value))


def test_decisions_are_datatroves(trips: dict[str, str]) -> None:
    """With their own defaults, but for the stop words, on texts that are torn out of the documents above."""
    filters = [GopherQualityFilter(language=WORDS, min_stop_words=None), GopherRepetitionFilter(language=WORDS)]
    draw, seen = random.Random(0), set()
    texts = [text for rule, text in trips.items() if rule != "long_doc"]
    for _ in range(300):
        one, other = draw.choices(texts, k=2)
        text = one[: draw.randrange(20, 1200)].strip() + "\n" + other[: draw.randrange(1200)].strip()
        text = text.strip()
        verdicts = [verdict for f in filters if (verdict := f.filter(Document(text=text, id=""))) is not True]
        found = judge(text)
        assert (found[0] if found else None) == (verdicts[0][1].removeprefix("gopher_") if verdicts else None)
        if found:
            seen.add(found[0])
            assert _fails(*found)
    assert len(seen) > 8


def test_scripts_without_spaces_are_not_judged_by_the_length_of_words() -> None:
    draw = random.Random(0)
    chinese = "".join("。" if n % 11 == 10 else chr(draw.randrange(0x4E00, 0x9000)) for n in range(400))
    assert judge(chinese) is None
    assert judge(chinese[:40]) == ("short_doc", pytest.approx(len(WORDS.word_tokenize(chinese[:40]))))
    assert [is_unspaced(w) for w in ("水", "か", "ไ", "word", "हिन्दी", "한국어")] == [True] * 3 + [False] * 3


def test_blank_lines_that_hold_a_space_are_no_repetition(made: SimpleNamespace) -> None:
    assert judge(made.prose(1, 240).replace("\n", "\n \n \t\n")) is None


def test_records_name_rule_and_value(tmp_path: Path, trips: dict[str, str], made: SimpleNamespace) -> None:
    short = {name: text for name, text in trips.items() if name != "long_doc"}
    made.run(tmp_path, [*short.values(), made.prose(9)], exact=False, near=False)
    removed = made.rows(tmp_path / "out", "removed")
    assert [row["rule"] for row in removed] == list(short)
    assert [row["value"] for row in removed] == [judge(text)[1] for text in short.values()]
    assert removed[0]["detail"] == "words < 50" and removed[0]["step"] == "quality"
    assert [row["text"] for row in made.rows(tmp_path / "out")] == [made.prose(9)]
