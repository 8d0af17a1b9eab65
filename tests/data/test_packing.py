from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from millrace.data.packing import best_fit_decreasing, cut, pack

COSTS = st.lists(st.integers(1, 70), max_size=60)


def reference_bfd(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing by trying every row."""
    rows: list[list[int]] = []
    free: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [r for r in range(len(rows)) if free[r] >= lengths[item]]
        if fitting:
            row = min(fitting, key=lambda r: (free[r], r))
            rows[row].append(item)
            free[row] -= lengths[item]
        else:
            rows.append([item])
            free.append(capacity - lengths[item])
    return rows


@given(st.lists(st.integers(1, 20), max_size=80), st.integers(20, 40))
def test_equals_the_brute_force(lengths: list[int], capacity: int) -> None:
    assert best_fit_decreasing(np.array(lengths, int), capacity) == reference_bfd(lengths, capacity)


@given(COSTS, st.integers(2, 32), st.booleans(), st.integers(0, 2**64 - 1), st.booleans())
def test_every_position_is_in_exactly_one_span(
    costs: list[int], capacity: int, best_fit: bool, key: int, alone: bool
) -> None:
    packs = pack(np.array(costs, int), capacity, best_fit, key, alone=alone)
    positions = [(slot, at) for slot, start, end in packs.spans.tolist() for at in range(start, end)]
    assert sorted(positions) == [(slot, at) for slot, cost in enumerate(costs) for at in range(cost)]
    lengths = packs.spans[:, 2] - packs.spans[:, 1]
    rows = [lengths[a:b].sum() for a, b in zip(packs.offsets[:-1], packs.offsets[1:], strict=True)]
    assert all(0 < row <= capacity for row in rows)
    if costs:
        assert packs.efficiency == sum(costs) / (len(rows) * capacity)


@given(COSTS, st.integers(2, 32))
def test_concatenation_keeps_the_order_and_fills_every_row(costs: list[int], capacity: int) -> None:
    packs = pack(np.array(costs, int), capacity, best_fit=False)
    stream = [(slot, at) for slot, start, end in packs.spans.tolist() for at in range(start, end)]
    assert stream == [(slot, at) for slot, cost in enumerate(costs) for at in range(cost)]
    assert len(packs) == -(-sum(costs) // capacity)


@given(COSTS, st.integers(2, 32), st.integers(1, 2**64 - 1))
def test_the_key_only_permutes_rows(costs: list[int], capacity: int, key: int) -> None:
    def rows(packs_key: int) -> list[list[list[int]]]:
        packs = pack(np.array(costs, int), capacity, True, packs_key)
        return [p.tolist() for p in np.split(packs.spans, packs.offsets[1:-1])]

    assert sorted(rows(key)) == sorted(rows(0))


def test_long_documents_are_cut_in_order() -> None:
    assert cut(np.array([5, 1, 4]), 2).tolist() == [
        [0, 0, 2],
        [0, 2, 4],
        [0, 4, 5],
        [1, 0, 1],
        [2, 0, 2],
        [2, 2, 4],
    ]


def test_packing_is_dense_and_mixes_lengths() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 1024).astype(int) + 1
    packs = pack(lengths, 1024, True, key=5)
    assert packs.efficiency > 0.99
    first = packs.spans[packs.offsets[:-1], 2] - packs.spans[packs.offsets[:-1], 1]
    assert abs(np.corrcoef(np.arange(len(first)), first)[0, 1]) < 0.2


@given(COSTS, st.integers(2, 32), st.integers(0, 2**64 - 1))
def test_alone_every_span_has_a_row(costs: list[int], capacity: int, key: int) -> None:
    packs = pack(np.array(costs, int), capacity, True, key, alone=True)
    assert packs.offsets.tolist() == list(range(len(packs.spans) + 1))
    assert sorted(packs.spans.tolist()) == cut(np.array(costs, np.int64), capacity).tolist()
