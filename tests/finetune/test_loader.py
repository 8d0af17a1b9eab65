from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.data.batch import spans_sha
from millrace.data.state import LoaderState
from millrace.data.stream import Deal
from millrace.finetune.examples import Example
from millrace.finetune.loader import ExampleLoader, Layout, heldout_batches, split
from millrace.finetune.sections import InstructConfig
from millrace.pretrain.objectives.causal_lm import CausalLMModule
from tests.handmade import small_model

LENGTH = 32


def make(count: int, seed: int = 0, *, whole: bool = False) -> list[Example]:
    """Examples whose tokens tell which they are."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        size = int(draw.integers(2, LENGTH + 1))
        ids = draw.integers(1, 250, size).astype(np.int32)
        labels = np.where(np.arange(size) >= size // 2, ids + 1, -100).astype(np.int64)
        made.append(Example(ids, np.array([number % 3]) if whole else labels, size, f"a:{number}"))
    return made


def load(examples: list[Example], *, rank: int = 0, world: int = 1, micro: int = 1, **how: Any) -> ExampleLoader:
    layout = Layout(LENGTH, how.get("pack", True), how.get("seed", 5), how.get("whole", False))
    return ExampleLoader(examples, layout, Deal(4, micro, rank, world), pad=0, state=how.get("state"))


@pytest.mark.parametrize("pack", [True, False])
def test_epochs_show_every_example_and_its_own_tokens(pack: bool) -> None:
    examples = make(50)
    loader = load(examples, pack=pack)
    seen: Counter[int] = Counter()
    for _ in range(loader.steps(3)):
        batch = next(loader)
        for micro in batch.micro_batches:
            row_spans = micro.spans[0]
            at = 0
            for sample, start, end in row_spans:
                assert start == 0 and end == len(examples[sample].input_ids)
                assert micro.input_ids_BT[0, at : at + end].tolist() == examples[sample].input_ids.tolist()
                assert micro.labels_BT[0, at : at + end].tolist() == examples[sample].labels.tolist()
                assert micro.position_ids_BT[0, at : at + end].tolist() == list(range(end))
                at += end
            assert (micro.labels_BT[0, at:] == -100).all()
        seen.update(sample for sample, _, _ in batch.spans)
        assert batch.local_tokens == sum(int((m.labels_BT != -100).sum()) for m in batch.micro_batches)
    assert min(seen.values()) == 3 and set(seen) == set(range(50)) and sum(seen.values()) <= 3 * 50 + 4 * LENGTH


@settings(max_examples=25)
@given(
    count=st.integers(1, 40),
    pack=st.booleans(),
    stop=st.integers(0, 6),
    worlds=st.sampled_from([(1, 2), (2, 4), (4, 1)]),
)
def test_resume_at_any_world_size_continues_the_same_rows(
    count: int, pack: bool, stop: int, worlds: tuple[int, int]
) -> None:
    examples = make(count, seed=count)
    whole = load(examples, pack=pack)
    expected = [next(whole) for _ in range(8)]
    before, after = worlds
    first = load(examples, pack=pack, world=before)
    for _ in range(stop):
        next(first)
    saved = LoaderState.from_dict(first.state.to_dict())
    ranks = [load(examples, pack=pack, world=after, rank=r, state=saved) for r in range(after)]
    for step in expected[stop:]:
        batches = [next(rank) for rank in ranks]
        assert {spans_sha(b.spans) for b in batches} == {spans_sha(step.spans)}
        assert {len(b.micro_batches) for b in batches} == {4 // after}
        assert sum(b.local_tokens for b in batches) == step.local_tokens
        # Row (accumulation * world + rank) of the step.
        dealt = [batches[i % after].micro_batches[i // after].spans for i in range(4)]
        assert dealt == [m.spans for m in step.micro_batches]


def test_order_changes_with_seed_and_epoch() -> None:
    examples = make(40)
    order = [[s for _ in range(10) for s, _, _ in next(loader).spans] for loader in (load(examples, pack=False),) * 2]
    other = [s for loader in (load(examples, pack=False, seed=6),) for _ in range(10) for s, _, _ in next(loader).spans]
    assert sorted(order[0]) == sorted(order[1]) == sorted(other) == list(range(40))
    assert order[0] != order[1] != other != order[0]


def test_other_examples_are_refused_on_resume() -> None:
    state = load(make(20)).state
    with pytest.raises(UserError, match="cannot resume the data stream: manifest"):
        load(make(20, seed=1), state=state)
    with pytest.raises(UserError, match="3 ranks"):
        load(make(20), world=3)


def test_rows_with_one_label_are_as_long_as_their_longest() -> None:
    examples = make(20, whole=True)
    loader = load(examples, pack=False, whole=True, micro=2)
    for batch in (next(loader) for _ in range(5)):
        for micro in batch.micro_batches:
            longest = max(lengths[0] for lengths in micro.seq_lens)
            assert micro.input_ids_BT.shape == (2, min(LENGTH, -(-longest // 8) * 8))
            assert micro.labels_BT.tolist() == [[row[0][0] % 3] for row in micro.spans]


@pytest.mark.parametrize("world", [1, 3])
def test_heldout_is_one_pass_with_equal_counts(world: int) -> None:
    examples = make(25)
    layout = Layout(LENGTH, True, 0, once=True)
    passes = [
        list(heldout_batches(examples, layout, Deal(2 * world, 2, rank, world), pad=0, max_rows=None))
        for rank in range(world)
    ]
    assert len({len(p) for p in passes}) == 1
    seen = [sample for p in passes for micro, _ in p for row in micro.spans for sample, _, _ in row]
    assert sorted(seen) == list(range(25))
    assert sum(size for p in passes for _, size in p) == sum(e.bytes for e in examples)


def test_split_keeps_equal_examples_together() -> None:
    examples = make(400) + make(400)
    train, held = split(examples, 0.25)
    there = {e.input_ids.tobytes() for e in held}
    assert not there & {e.input_ids.tobytes() for e in train}
    assert len(train) + len(held) == 800 and 140 < len(held) < 260
    assert split(examples, 0.0) == (examples, [])


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_packed_examples_have_the_loss_that_they_have_alone(kind: str) -> None:
    examples = make(9, seed=3)
    objective = CausalLMModule(small_model(kind), InstructConfig())

    def losses(pack: bool) -> tuple[float, int]:
        batches = heldout_batches(examples, Layout(LENGTH, pack, 0, once=True), Deal(1, 1, 0, 1), pad=0, max_rows=None)
        found = [objective(**objective.inputs(micro, torch.device("cpu")))[0].item() for micro, _ in batches]
        return sum(found), len(found)

    (packed, rows), (alone, nine) = losses(True), losses(False)
    assert nine == 9 and rows < 9, "nothing was packed"
    assert packed == pytest.approx(alone, rel=1e-5)
