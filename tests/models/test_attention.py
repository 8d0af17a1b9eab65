"""Attention per document against the mask: values, gradients, compilation, and its places in transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from millrace.models.attention import PADDING, attend, document_starts, documents_attention, mask_of
from millrace.models.packing import document_inputs

ROWS = [[5, 20, 7], [1, 1, 12], []]
LENGTH = 32
WHOLE = [[LENGTH]] * 3  # every row is one document


def heads(dtype: torch.dtype = torch.float64, keys: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, LENGTH, 16), (3, keys, LENGTH, 16), (3, keys, LENGTH, 16)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def real(rows: list[list[int]]) -> torch.Tensor:
    return document_starts(rows, LENGTH)[:, 0, 0] != PADDING


def test_table_of_starts() -> None:
    table = document_starts([[2, 1], [4], []], 4)
    assert table.shape == (3, 1, 1, 4) and table.dtype == torch.int32
    assert table[:, 0, 0].tolist() == [[0, 0, 2, -1], [0, 0, 0, 0], [-1, -1, -1, -1]]


def test_mask_against_its_definition() -> None:
    window = 3
    mask = mask_of(document_starts([[2, 5]], 9), window)[0, 0]
    document = [0, 0, 1, 1, 1, 1, 1, None, None]
    for q in range(9):
        for k in range(9):
            same = document[q] is not None and document[q] == document[k] and k <= q and q - k < window
            assert mask[q, k].item() == (same or q == k), (q, k)


@pytest.mark.parametrize("rows", [ROWS, WHOLE], ids=["packed", "whole"])
@pytest.mark.parametrize("window", [0, 4, 64])
def test_values_and_gradients_equal_those_of_the_mask(window: int, rows: list[list[int]]) -> None:
    starts, (query, key, value) = document_starts(rows, LENGTH), heads()
    out, lse = attend(query, key, value, starts, 0.3, window)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_of(starts, window), scale=0.3)
    keep = real(rows)[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[keep], expected[keep])
    assert (out[~keep] == 0).all() and lse.shape == (3, LENGTH, 4)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype) * keep
    ours = torch.autograd.grad((out * weight).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right)


def test_gradient_is_that_of_finite_differences() -> None:
    starts = document_starts([[3, 2]], 6)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 6, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, starts, 0.5, 2)[0], inputs)


@pytest.mark.parametrize("rows", [ROWS, WHOLE], ids=["packed", "whole"])
def test_operator_keeps_the_rules_of_custom_operators(rows: list[list[int]]) -> None:
    arguments = (*heads(torch.float32), document_starts(rows, LENGTH), 0.25, 0)
    torch.library.opcheck(attend, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_heads_through_the_interface(dtype: torch.dtype) -> None:
    """Two key heads for four query heads, against the mask; queries may come in fp32 under autocast."""
    starts, (query, key, value) = document_starts(ROWS, LENGTH), heads(dtype, keys=2)
    module = nn.Module()
    module.num_key_value_groups = 2
    out, _ = documents_attention(module, query.float(), key.float(), value, starts, scaling=0.25)
    masked, _ = documents_attention(module, query, key, value, mask_of(starts), scaling=0.25)
    tolerance = {"atol": 1e-5, "rtol": 0} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(out[real(ROWS)], masked[real(ROWS)], **tolerance)
    assert out.dtype == dtype and out.shape == (3, LENGTH, 4, 16)


def test_dropout_falls_back_to_the_mask() -> None:
    starts, tensors = document_starts(ROWS, LENGTH), heads(torch.float32)
    torch.manual_seed(0)
    out, _ = documents_attention(nn.Module(), *tensors, starts, scaling=0.25, dropout=0.5)
    torch.manual_seed(0)
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=mask_of(starts), scale=0.25, dropout_p=0.5)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_without_a_table_it_is_sdpa(build: Callable, ids_BT: torch.Tensor) -> None:
    ours, sdpa = build("qwen3"), build("qwen3", attention="sdpa")
    mask = torch.ones_like(ids_BT)
    mask[0, :10] = 0  # padding on the left, as in generation
    for inputs in ({}, {"attention_mask": mask}):
        left, right = (m(input_ids=ids_BT, use_cache=False, **inputs).logits for m in (ours, sdpa))
        assert torch.equal(left, right)
    left, right = (m.eval().generate(ids_BT, max_new_tokens=5, do_sample=False, use_cache=True) for m in (ours, sdpa))
    assert torch.equal(left, right)


def test_compiled_once_for_all_document_lengths(build: Callable, ids_BT: torch.Tensor) -> None:
    """One graph, no break; other lengths do not recompile; loss and gradients equal those of eager."""
    torch._dynamo.reset()
    model = build("qwen3", config={"hidden_size": 64, "num_hidden_layers": 1})
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.model, backend=graphs, fullgraph=True)
    for rows in ([[10, 54], [64]], [[1, 2, 3], [30, 34]], [[64], [5] * 12]):
        positions = torch.arange(64) - document_starts(rows, 64)[:, 0, 0].clamp_min(0)
        inputs = document_inputs(positions.long(), rows, "documents")
        results = []
        for run in (compiled, model.model):
            model.zero_grad()
            out = run(input_ids=ids_BT, **inputs).last_hidden_state
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad.clone() for p in model.model.parameters())])
        for left, right in zip(*results, strict=True):
            torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)
    assert graphs.frame_count == 1
