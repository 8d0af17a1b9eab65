"""Span corruption: what is replaced, and that nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.pretrain.objectives.span_corruption import corrupt, noise_mask, noise_spans

FIRST, EOS = 1000, 999


def joined(read: np.ndarray, written: np.ndarray) -> list[int]:
    """The row that was corrupted, from both parts."""
    gaps: dict[int, list[int]] = {}
    for token in written[:-1].tolist():
        if token >= FIRST:
            gaps[token] = []
            now = gaps[token]
        else:
            now.append(token)
    return [t for token in read[:-1].tolist() for t in (gaps[token] if token >= FIRST else [token])]


@settings(max_examples=200)
@given(st.integers(0, 300), st.floats(0.05, 0.6), st.floats(1.0, 8.0), st.integers(0, 2**63))
def test_both_parts_give_the_row(length: int, share: float, mean: float, seed: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 900, length)
    noise = noise_mask(length, share, mean, np.random.default_rng(seed))
    read, written = corrupt(tokens, noise, FIRST, EOS)
    assert read[-1] == written[-1] == EOS
    assert joined(read, written) == tokens.tolist()
    if length >= 2:
        count, spans = noise_spans(length, share, mean)
        assert noise.sum() == count and not noise[0]
        sentinels = read[read >= FIRST]
        assert sentinels.tolist() == list(range(FIRST, FIRST + spans)), "one for each span, in order"
        assert len(read) == length - count + spans + 1 and len(written) == count + spans + 1


def test_lengths_of_the_paper() -> None:
    """568 tokens become 512 and 114 at 15% and spans of 3 (mesh-tensorflow's `random_spans_helper`)."""
    tokens = np.arange(568)
    read, written = corrupt(tokens, noise_mask(568, 0.15, 3.0, np.random.default_rng(0)), FIRST, EOS)
    assert (len(read), len(written)) == (512, 114)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_from_the_same_seed(seed: int) -> None:
    first, again, other = (noise_mask(100, 0.15, 3.0, np.random.default_rng(s)) for s in (seed, seed, seed + 7))
    assert (first == again).all() and (first != other).any()
