"""Exact duplicates against a dictionary."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.data.curate.exact import content_hash, find_duplicates, normalise


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("The mill\n\n  turns", "the MILL turns ", True),
        ("caf\u00e9", "cafe\u0301", True),  # composed, decomposed
        ("the\u00a0mill", "the mill", True),  # a space that does not break
        ("the mill turns", "the mill turns.", False),
        ("the mill 1", "the mill 2", False),
        ("cafe", "café", False),
        ("themill", "the mill", False),
        ("", " \n", True),
    ],
)
def test_what_counts_as_equal(one: str, other: str, same: bool) -> None:
    assert (normalise(one) == normalise(other)) is same
    assert (content_hash(one) == content_hash(other)) is same


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40))
def test_duplicates_are_those_of_a_dictionary(hashes: list[tuple[int, int]]) -> None:
    first: dict[tuple[int, int], int] = {}
    expected = [(at, first[h]) for at, h in enumerate(hashes) if first.setdefault(h, at) != at]
    high, low = np.array(hashes, np.uint64).reshape(-1, 2).T
    duplicates, kept = find_duplicates(high, low)
    assert list(zip(duplicates.tolist(), kept.tolist(), strict=True)) == expected


def test_the_first_in_input_order_stays_and_is_named(tmp_path: Path, made: SimpleNamespace) -> None:
    texts = [made.prose(0), made.prose(1), made.prose(0).upper(), made.prose(2), "  " + made.prose(1)]
    made.run(tmp_path, texts, quality=False, near=False)
    out, name = tmp_path / "out", f"{tmp_path}/in.jsonl#"
    assert [(row["id"], row["text"]) for row in made.rows(out)] == [(f"{name}{n}", texts[n]) for n in (0, 1, 3)]
    removed = [(row["id"], row["kept"], row["step"]) for row in made.rows(out, "removed")]
    assert removed == [(f"{name}2", f"{name}0", "exact"), (f"{name}4", f"{name}1", "exact")]


def test_across_files_and_inputs(tmp_path: Path, made: SimpleNamespace) -> None:
    from millrace.data.curate.curate import curate

    inputs = [made.write(tmp_path / f"{n}.jsonl", [made.prose(n), made.prose(7), "x"]) for n in range(3)]
    report = curate(made.config(tmp_path, inputs, quality=False, near=False)).report
    kept = [f"{tmp_path}/0.jsonl#1", f"{tmp_path}/0.jsonl#2"]
    assert [row["kept"] for row in made.rows(tmp_path / "out", "removed")] == kept * 2
    assert [source["kept"]["documents"] for source in report["sources"]] == [3, 1, 1]
    assert report["exact"] == {"clusters": 2, "largest": 3}
