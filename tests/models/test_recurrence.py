"""Scans and convolutions along packed rows: against a loop over time, and against documents alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from millrace.models.recurrence import DocumentConv1d, documents, linear_scan, state_space_scan

DOCUMENTS = [5, 1, 2, 9, 3]  # lengths in a row


def by_time(decay_BTD: Tensor, inputs_BTD: Tensor) -> Tensor:
    state_BD, states = torch.zeros_like(inputs_BTD[:, 0]), []
    for decay_BD, inputs_BD in zip(decay_BTD.unbind(1), inputs_BTD.unbind(1), strict=True):
        state_BD = decay_BD * state_BD + inputs_BD
        states.append(state_BD)
    return torch.stack(states, 1)


def positions() -> Tensor:
    return torch.cat([torch.arange(length) for length in DOCUMENTS])[None]


def spans() -> Iterator[slice]:
    yield from (slice(start, end) for start, end in itertools.pairwise([0, *itertools.accumulate(DOCUMENTS)]))


def with_gradients(found: Tensor, *leaves: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).reshape(found.shape)
    return [found.detach(), *torch.autograd.grad((found * weights).sum(), leaves)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 45), st.integers(0, 2**31))
def test_scan_is_the_loop_over_time(length: int, chunk: int, seed: int) -> None:
    """Values and gradients, any length and chunk, with resets."""
    random = torch.Generator().manual_seed(seed)
    decay = torch.rand(2, length, 3, dtype=torch.float64, generator=random)
    decay = (decay * (torch.rand(2, length, 1, generator=random) > 0.2)).requires_grad_()
    inputs = torch.randn(2, length, 3, dtype=torch.float64, generator=random, requires_grad=True)
    ours, theirs = (
        with_gradients(f, decay, inputs) for f in (linear_scan(decay, inputs, chunk), by_time(decay, inputs))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradient_by_differences() -> None:
    decay = torch.rand(1, 11, 2, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(1, 11, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear_scan, (decay, inputs))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-45, 1e-38, 1e-8, 0.5, 1 - 2**-24, 1.0]), min_size=1, max_size=30))
def test_extreme_decays_neither_overflow_nor_lose_anything(decays: list[float]) -> None:
    """1,500 positions in fp32, with gradients, against float64."""
    pattern = torch.tensor(decays).repeat(1500 // len(decays) + 1)[:1500]
    decay = pattern[None, :, None].clone().requires_grad_()
    inputs = torch.randn(1, 1500, 1, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ours = with_gradients(linear_scan(decay, inputs), decay, inputs)
    wide = [leaf.detach().double().requires_grad_() for leaf in (decay, inputs)]
    for mine, exact in zip(ours, with_gradients(by_time(*wide), *wide), strict=True):
        assert mine.isfinite().all()
        assert (mine.double() - exact).abs().max() <= 2e-5 * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_long_rows(decay: float) -> None:
    """A geometric series of 100,000 terms, whose gradient is the same series from the end."""
    length = 100_000
    inputs = torch.ones(1, length, 1, requires_grad=True)
    states = linear_scan(torch.full((1, length, 1), decay), inputs)
    terms = torch.arange(1.0, length + 1)
    expected = terms if decay == 1 else (1 - decay**terms) / (1 - decay)
    torch.testing.assert_close(states[0, :, 0], expected)
    (gradient,) = torch.autograd.grad(states.sum(), inputs)
    torch.testing.assert_close(gradient[0, :, 0], expected.flip(0))


def test_operator_keeps_the_rules_of_custom_operators() -> None:
    decay, inputs = (torch.rand(2, 7, 3, requires_grad=True) for _ in range(2))
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.millrace.linear_scan.default, (decay, inputs, 3), test_utils=quick)


def test_the_graph_has_one_node_for_a_scan() -> None:
    """Nothing is kept for the backward pass but the decays and the states."""
    decay = torch.rand(1, 64, 2, requires_grad=True)
    node = linear_scan(decay, torch.ones(1, 64, 2)).grad_fn
    assert node is not None and "linear_scan" in node.name()


def test_convolution_is_that_of_documents_alone() -> None:
    convolution = nn.Conv1d(6, 6, 4, groups=6, padding=3).double()
    inputs = torch.randn(2, 6, sum(DOCUMENTS), dtype=torch.float64, requires_grad=True)
    leaves = (inputs, convolution.weight, convolution.bias)
    parts = [convolution(inputs[..., span])[..., : span.stop - span.start] for span in spans()]
    alone = with_gradients(torch.cat(parts, -1), *leaves)
    across = convolution(inputs)[..., : inputs.shape[-1]]
    DocumentConv1d.adopt(convolution)
    torch.testing.assert_close(with_gradients(convolution(inputs, positions()), *leaves), alone)
    torch.testing.assert_close(convolution(inputs)[..., : inputs.shape[-1]], across)
    assert (across - alone[0]).abs().max() > 0.1


def test_convolution_of_a_row_that_goes_on_does_not_wrap_around() -> None:
    convolution = nn.Conv1d(2, 2, 4, groups=2, padding=3)
    DocumentConv1d.adopt(convolution)
    inputs, at = torch.randn(1, 2, 8), torch.arange(8)[None] + 100
    torch.testing.assert_close(convolution(inputs, at), convolution(inputs)[..., :8])


def state_space_by_time(inputs: Tensor, log_decay: Tensor, into: Tensor, out: Tensor) -> Tensor:
    """One document: (T, H, P), (T, H), (T, G, N), (T, G, N) → (T, H, P)."""
    each = inputs.shape[1] // into.shape[1]
    into, out = into.repeat_interleave(each, 1), out.repeat_interleave(each, 1)
    state, found = torch.zeros_like(inputs[0, :, :, None] * into[0, :, None]), []
    for at in range(len(inputs)):
        state = log_decay[at].exp()[:, None, None] * state + inputs[at, :, :, None] * into[at, :, None]
        found.append((state * out[at, :, None]).sum(-1))
    return torch.stack(found)


@pytest.mark.parametrize("chunk", [1, 3, 8, 20, 64])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_state_space_scan_is_the_loop_over_time(chunk: int, scale: float) -> None:
    """Two groups of two heads; documents that end inside chunks and span them; gentle and extreme decays."""
    random, length = torch.Generator().manual_seed(0), sum(DOCUMENTS)
    shapes = [(2, length, 4, 3), (2, length, 4), (2, length, 2, 5), (2, length, 2, 5)]
    leaves = [torch.randn(shape, dtype=torch.float64, generator=random) for shape in shapes]
    leaves[1] = -scale * leaves[1].exp()
    inputs, log_decay, into, out = (leaf.requires_grad_() for leaf in leaves)
    found = state_space_scan(inputs, log_decay, into, out, documents(positions()), chunk)
    rows = [
        torch.cat([state_space_by_time(*(leaf[row, span] for leaf in leaves)) for span in spans()]) for row in (0, 1)
    ]
    ours, theirs = with_gradients(found, *leaves), with_gradients(torch.stack(rows), *leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_state_space_scan_in_fp32_is_exact_where_sums_are_large() -> None:
    """Decays of a chunk add up to thousands; what is near must not suffer from that."""
    shapes = [(1, 256, 1, 4), (1, 256, 1), (1, 256, 1, 4), (1, 256, 1, 4)]
    exact = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    exact[1] = torch.where(torch.rand(1, 256, 1) < 0.5, -1e-3, -50.0).double()
    document = torch.ones(1, 256, dtype=torch.long)
    ours = state_space_scan(*(e.float() for e in exact), document, 256)
    torch.testing.assert_close(ours.double(), state_space_scan(*exact, document, 16), rtol=0, atol=2e-5)
