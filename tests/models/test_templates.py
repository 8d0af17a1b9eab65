"""Rows of templates: every part once and in order, what counts for how much, and which template a sample takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.models.templates import Emphasis, Layout, Template, choose, kinds
from millrace.models.vocabulary import NOTHING, Vocabulary, closing, opening, tags

NAMES = ("text", "image", "audio")
VOCABULARY = Vocabulary.lay_out(
    50, {tag: 50 + number for number, tag in enumerate(tags(["image", "audio"]))}, {"image": 16, "audio": 12}
)
BOS, EOS = 1, 2
EMPHASIS = Emphasis(0.25, {"text": 4.0})


def layout(longest: int = 1000) -> Layout:
    return Layout(VOCABULARY, (BOS, EOS), EMPHASIS, longest)


@st.composite
def templates(draw: Any) -> Template:
    names = draw(st.permutations(NAMES))[: draw(st.integers(1, 3))]
    prompt = draw(st.integers(0, len(names) - 1))
    return Template(tuple(names[:prompt]), tuple(names[prompt:]))


def contents() -> Any:
    sizes = {name: len(VOCABULARY.segment(name)) for name in NAMES}
    return st.fixed_dictionaries(
        {n: st.lists(st.integers(0, s - 1), min_size=1, max_size=6).map(np.array) for n, s in sizes.items()}
    )


@given(templates(), contents(), st.booleans())
def test_every_part_stands_once(template: Template, parts: dict[str, np.ndarray], dropped: bool) -> None:
    row = layout().row(template, parts, dropped=dropped)
    shown = template.answer if dropped else template.parts
    wanted, weights, which = [BOS], [], []
    if dropped:
        wanted, weights, which = [BOS, VOCABULARY.tags[NOTHING]], [0.0], [None]
    for name in shown:
        role = "answer" if name in template.answer else "prompt"
        piece = (parts[name] + {"text": 0, "image": 55, "audio": 71}[name]).tolist()
        if name != "text":
            piece = [VOCABULARY.tags[opening(name)], *piece, VOCABULARY.tags[closing(name)]]
        piece += [EOS] if name == shown[-1] else []
        wanted += piece
        weights += [(4.0 if name == "text" else 1.0) * (0.25 if role == "prompt" else 1.0)] * len(piece)
        which += [kinds(VOCABULARY).index((name, role))] * len(piece)
    assert row.tokens.tolist() == wanted
    assert row.shares.tolist() == weights
    assert all(a == b for a, b in zip(row.kinds.tolist(), which, strict=True) if b is not None)


@given(templates())
def test_a_template_is_what_it_is_written_as(template: Template) -> None:
    assert Template.parse(template.row, template.weight) == template


@given(st.lists(templates(), min_size=1, max_size=4), st.sets(st.sampled_from(NAMES)), st.integers(0, 2**32))
def test_a_sample_takes_only_templates_whose_parts_it_has(chosen: list[Template], there: set[str], seed: int) -> None:
    parts = {name: np.array([1]) if name in there else np.empty(0, np.int64) for name in NAMES}
    found = choose(chosen, parts, np.random.default_rng(seed))
    fitting = [template for template in chosen if set(template.parts) <= there]
    assert found in fitting if fitting else found is None


def test_templates_are_taken_by_weight() -> None:
    three = [Template(("image",), ("text",), 3.0), Template((), ("text",), 1.0), Template((), ("audio",), 9.0)]
    parts = {"image": np.array([1]), "text": np.array([1])}
    taken = [choose(three, parts, np.random.default_rng(seed)) for seed in range(2000)]
    assert taken.count(three[2]) == 0
    assert taken.count(three[0]) / len(taken) == pytest.approx(0.75, abs=0.04)  # four deviations


@given(contents(), st.integers(5, 30))
def test_text_is_cut_to_what_fits(parts: dict[str, np.ndarray], longest: int) -> None:
    template = Template(("image",), ("text",))
    without = 1 + len(parts["image"]) + 2
    if without > longest:
        with pytest.raises(UserError, match=r"'image > text' has \d+ positions without its text"):
            layout(longest).row(template, parts)
        return
    row = layout(longest).row(template, parts)
    kept = min(len(parts["text"]), longest - without)
    assert len(row.shares) == min(without + len(parts["text"]), longest)
    assert row.tokens[-1 - kept : -1].tolist() == parts["text"][:kept].tolist()


@pytest.mark.parametrize("row", ["", ">", "image >", "> text", "image image", "text > text", "a > b > c"])
def test_rows_that_are_none(row: str) -> None:
    with pytest.raises(UserError, match="name each modality once"):
        Template.parse(row)


@given(st.lists(st.integers(0, 49), min_size=1, max_size=6).map(np.array))
def test_a_document_of_text_is_what_its_template_makes(words: np.ndarray) -> None:
    made = layout().row(Template((), ("text",)), {"text": words})
    inputs, labels = np.array([BOS, *words]), np.array([*words, EOS])
    same = layout().text(inputs, labels)
    assert all(np.array_equal(a, b) for a, b in zip(vars(made).values(), vars(same).values(), strict=True))
    piece = layout().text(inputs, np.where(labels % 3, labels, -100))
    assert np.array_equal(piece.shares > 0, labels % 3 > 0)


def test_a_weight_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="the row 'text' has the weight 0"):
        Template.parse("text", 0)
