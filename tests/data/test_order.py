from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.data.order import Blocks, Growth, Order, derive_key, permutation, permute


def make(sizes: list[int], seed: int, shuffle_blocks: int) -> Order:
    return Order([Growth(0, Blocks.of(sizes))], seed, shuffle_blocks)


SEEDS = st.integers(0, 2**64 - 1)


@given(st.integers(1, 400), SEEDS)
def test_permute_is_a_bijection(size: int, key: int) -> None:
    image = permute(np.arange(size), np.array([size]), np.array([key], np.uint64))
    assert sorted(image.tolist()) == list(range(size))


@given(st.integers(0, 400), SEEDS)
def test_a_whole_permutation_equals_its_single_values(size: int, key: int) -> None:
    one_by_one = permute(np.arange(size), np.array([size]), np.array([key], np.uint64))
    assert permutation(size, key).tolist() == one_by_one.tolist()


@pytest.mark.parametrize("size", [2**31 + 5, 2**40 + 1, 10**15])
def test_permute_of_large_domains_stays_inside_and_never_collides(size: int) -> None:
    index = np.concatenate([np.arange(5000), size - 1 - np.arange(5000)])
    image = permute(index, np.array([size]), np.array([7], np.uint64))
    assert image.min() >= 0 and image.max() < size
    assert len(np.unique(image)) == len(index)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=25), SEEDS, st.integers(1, 9), st.integers(0, 5))
def test_every_epoch_is_a_bijection(blocks: list[int], seed: int, shuffle_blocks: int, epoch: int) -> None:
    order, total = make(blocks, seed, shuffle_blocks), sum(blocks)
    seen = order.samples(epoch * total, (epoch + 1) * total)
    assert sorted(seen.tolist()) == list(range(total))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), SEEDS, st.integers(0, 300), st.integers(0, 90))
def test_any_range_equals_its_single_positions(blocks: list[int], seed: int, start: int, count: int) -> None:
    together = make(blocks, seed, 3).samples(start, start + count).tolist()
    assert together == [make(blocks, seed, 3).sample_at(g) for g in range(start, start + count)]


def test_a_group_draws_from_its_blocks_only() -> None:
    order = make([10] * 12, seed=3, shuffle_blocks=4)
    for group in range(3):
        blocks = {sample // 10 for sample in order.samples(group * 40, group * 40 + 40).tolist()}
        assert len(blocks) == 4


def test_seed_and_epoch_change_the_order() -> None:
    order, other = make([50] * 4, 1, 2), make([50] * 4, 2, 2)
    first = order.samples(0, 200).tolist()
    assert first != order.samples(200, 400).tolist()
    assert first != other.samples(0, 200).tolist()
    assert first != list(range(200))


def test_the_order_is_close_to_uniform() -> None:
    """Mean position of every sample over 400 seeds lies near the middle (6 standard errors)."""
    positions = np.zeros(60)
    for seed in range(400):
        positions[make([5] * 12, seed, 12).samples(0, 60)] += np.arange(60)
    error = 60 / np.sqrt(12) / np.sqrt(400)
    assert np.abs(positions / 400 - 29.5).max() < 6 * error


def test_known_values_never_change() -> None:
    """A change here would silently reorder the data of every run in progress."""
    known = [6, 5, 4, 9, 8, 7, 2, 3, 0, 1, 4, 1, 2, 6, 3, 7, 0, 5, 9, 8]
    assert make([4, 4, 2], 1, 2).samples(0, 20).tolist() == known
    assert derive_key(1, 2, 3) == 15020427595393229491


@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.lists(st.integers(1, 7), min_size=1, max_size=5)), min_size=1, max_size=5
    ),
    SEEDS,
    st.integers(1, 4),
)
def test_growth_draws_every_sample_once_in_every_epoch(
    steps: list[tuple[int, list[int]]], seed: int, shuffle_blocks: int
) -> None:
    """Blocks that come in the middle of an epoch are still drawn in it; the next epoch holds everything."""
    growth, position, first = [], 0, 0
    for number, (after, sizes) in enumerate(steps):
        position += after if number else 0
        blocks = Blocks.of(sizes)
        growth.append(Growth(position, Blocks(blocks.firsts + first, blocks.sizes)))
        first += sum(sizes)
    drawn = Order(growth, seed, shuffle_blocks).samples(0, position + 2 * first).tolist()
    there: set[int] = set()
    left: set[int] = set()
    for at, sample in enumerate(drawn):
        for grown in growth:
            if grown.position == at:
                new = {
                    int(f) + i for f, n in zip(grown.blocks.firsts, grown.blocks.sizes, strict=True) for i in range(n)
                }
                there = there | new
                left = left | new if left else set(there)
        left = left or set(there)
        assert sample in left
        left.remove(sample)
    for number, grown in enumerate(growth):  # what was drawn before does not depend on what came later
        before = Order(growth[:number], seed, shuffle_blocks).samples(0, grown.position) if number else []
        assert drawn[: grown.position] == list(before)
