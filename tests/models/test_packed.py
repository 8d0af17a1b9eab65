"""A document's logits in a packed row equal those of the document alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from millrace.core.errors import UserError
from millrace.models.packing import PACKABLE, check_packable, document_inputs

ROWS = [[20, 3, 41], [30, 1, 9], [64]]  # the second row ends with padding, the third holds one document
LENGTH = 64
WITHOUT_ATTENTION = ("lstm", "mamba2")
LOUD = 4.0  # logits up to here are compared as they are, larger ones in proportion


def positions(rows: list[list[int]], length: int) -> torch.Tensor:
    out = torch.zeros(len(rows), length, dtype=torch.long)
    for row, lengths in enumerate(rows):
        out[row, : sum(lengths)] = torch.tensor([at for n in lengths for at in range(n)], dtype=torch.long)
    return out


def largest_difference(model: nn.Module, rows: list[list[int]], ids_BT: torch.Tensor, **changes: object) -> float:
    length = ids_BT.shape[1]
    inputs = document_inputs(positions(rows, length), rows, model.config._attn_implementation) | changes
    packed = logits(model, ids_BT, **inputs)
    worst = 0.0
    for row, lengths in enumerate(rows):
        start = 0
        for size in lengths:
            part = slice(start, start + size)
            alone = logits(model, ids_BT[row : row + 1, part], use_cache=False)
            worst = max(worst, (packed[row, part] - alone[0]).abs().max().item())
            start += size
    return worst / max(1.0, packed.abs().max().item() / LOUD)


def logits(model: nn.Module, ids_BT: torch.Tensor, **inputs: object) -> torch.Tensor:
    """As in training: the backbone gets what tells documents apart, of which not every whole model passes it on."""
    return model.get_output_embeddings()(model.base_model(input_ids=ids_BT, **inputs).last_hidden_state)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 500, (len(ROWS), LENGTH), generator=torch.Generator().manual_seed(1))


def loud(model: nn.Module) -> nn.Module:
    """Larger weights, so that a leak shows far above 1e-5, and training mode, as in a run."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "router" not in name and "gate.weight" not in name:
            parameter.data *= 3
    return model.train()


@pytest.mark.parametrize("kind", sorted(PACKABLE))
@pytest.mark.parametrize("attention", ["auto", "mask"])
def test_packed_equals_alone(kind: str, attention: str, build: Callable, ids: torch.Tensor) -> None:
    if attention == "mask" and kind == "gemma2":
        pytest.skip("its own choice is the mask already")
    if attention == "mask" and kind in WITHOUT_ATTENTION:
        pytest.skip("it has no attention")
    model = loud(build(kind, attention="auto" if attention == "auto" else "sdpa"))
    assert largest_difference(model, ROWS, ids) < 1e-5


@pytest.mark.parametrize("kind", sorted(PACKABLE))
def test_the_comparison_can_fail(kind: str, build: Callable, ids: torch.Tensor) -> None:
    """With a mask of ones transformers derives no documents, and without positions nobody does: it must show."""
    nothing = {"attention_mask": torch.ones_like(ids), "position_ids": None}
    assert largest_difference(loud(build(kind)), ROWS, ids, **nothing) > 1e-3


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "gemma2"])
@pytest.mark.parametrize("attention", ["auto", "mask"])
def test_packed_equals_alone_with_a_sliding_window(
    kind: str, attention: str, build: Callable, ids: torch.Tensor
) -> None:
    table = {"sliding_window": 8}
    if kind == "qwen2":
        table |= {"use_sliding_window": True, "max_window_layers": 1}
    wanted = "sdpa" if attention == "mask" and kind != "gemma2" else "auto"
    windowed = loud(build(kind, config=table, attention=wanted))
    assert largest_difference(windowed, ROWS, ids) < 1e-5
    whole = loud(build(kind, config={"sliding_window": 4096}, attention=wanted))
    left, right = (m(input_ids=ids, use_cache=False).logits for m in (windowed, whole))
    assert (left - right).abs().max() > 1e-3, "the window changes nothing"


@pytest.mark.parametrize("kind", sorted(PACKABLE))
def test_gradients_of_packed_rows_are_those_of_documents_alone(kind: str, build: Callable, ids: torch.Tensor) -> None:
    model = loud(build(kind))
    inputs = document_inputs(positions(ROWS, LENGTH), ROWS, model.config._attn_implementation)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, lengths in enumerate(ROWS):
        mask[row, : sum(lengths)] = True
    logits(model, ids, **inputs)[mask].square().sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, lengths in enumerate(ROWS):
        start = 0
        for size in lengths:
            alone = ids[row : row + 1, start : start + size]
            logits(model, alone, use_cache=False).square().sum().backward()
            start += size
    for name, parameter in model.named_parameters():
        if name in packed:
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(packed[name], parameter.grad, atol=2e-5 * max(scale, 1e-3), rtol=0)


@settings(max_examples=20)
@given(st.lists(st.lists(st.integers(1, 12), max_size=5), min_size=1, max_size=3))
def test_any_division_into_documents(build: Callable, rows: list[list[int]]) -> None:
    ids = torch.randint(1, 500, (len(rows), 60), generator=torch.Generator().manual_seed(1))
    assert largest_difference(loud(build("qwen3", config={"hidden_size": 64})), rows, ids) < 1e-5


@pytest.mark.parametrize("kind", ["xlstm"])
def test_recurrent_kinds_are_refused_by_name_and_do_leak(kind: str, build: Callable, ids: torch.Tensor) -> None:
    with pytest.raises(
        UserError, match=f"'{kind}' cannot be trained on packed.*recurrent.*'alone', or take one of .*qwen3"
    ):
        check_packable(kind)
    assert largest_difference(build(kind), ROWS, ids) > 1e-5


def test_unproven_kinds_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="'opt' cannot be trained on packed.*nobody has proven.*llama"):
        check_packable("opt")
    check_packable("qwen3")


def test_list_of_packable_kinds() -> None:
    assert {"qwen3", "llama", "gpt2", "mistral", "qwen2", "olmo2", "gemma2", "nanochat", "mixtral"} <= PACKABLE
