"""The chunked loss through the head against full logits and torch's cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from millrace.models.heads import LogitsTransform
from millrace.pretrain.objectives.head_loss import LossHead, _add_product

N, D, V = 37, 16, 50


def reference(hidden, weight, bias, labels, z_loss, transform):
    logits = transform(F.linear(hidden, weight, bias))
    nll = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    lse = torch.logsumexp(logits, -1)[labels != -100]
    return nll + z_loss * lse.square().sum(), nll, logits.max()


@pytest.mark.parametrize("chunk", [1, 10, 37, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transform", [LogitsTransform(), LogitsTransform(cap=3.0), LogitsTransform(factor=0.25)])
def test_equals_full_logits(chunk, z_loss, bias, transform):
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias, dtype=torch.float64)
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, V, (N,))
    labels[::5] = -100
    wanted, nll, top = reference(hidden, head.weight, head.bias, labels, z_loss, transform)
    parameters = [hidden, *head.parameters()]
    wanted_grads = torch.autograd.grad(0.3 * wanted, parameters)
    LossHead.adopt(head, z_loss=z_loss, transform=transform, chunk=chunk)
    loss, metrics = head(hidden, labels=labels)
    grads = torch.autograd.grad(0.3 * loss, parameters)
    # The sums are kept in float32, hence not 1e-12.
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics.double(), torch.stack([nll, top]), rtol=1e-6, atol=0)
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("transform", [LogitsTransform(), LogitsTransform(cap=3.0, factor=0.25)])
def test_targets_may_count_for_more_or_less(z_loss, transform):
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=True, dtype=torch.float64)
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    labels, shares = torch.randint(0, V, (N,)), torch.rand(N) * 3
    labels[::5], shares[1::4] = -100, 0.0
    logits = transform(head(hidden))
    nll = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    wanted = (shares * (nll + z_loss * (labels != -100) * torch.logsumexp(logits, -1).square())).sum()
    parameters = [hidden, *head.parameters()]
    wanted_grads = torch.autograd.grad(0.3 * wanted, parameters)
    LossHead.adopt(head, z_loss=z_loss, transform=transform, chunk=10)
    loss, metrics, each = head(hidden, labels=labels, shares=shares)
    grads = torch.autograd.grad(0.3 * loss, parameters)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(each.double(), nll, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics.double(), torch.stack([nll.sum(), logits.max()]), rtol=1e-6, atol=0)
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_without_labels_it_is_the_old_head():
    head = nn.Linear(D, V)
    hidden = torch.randn(2, 3, D)
    wanted = head(hidden)
    LossHead.adopt(head, z_loss=0.0, transform=LogitsTransform(), chunk=8)
    assert torch.equal(head(hidden), wanted)


def test_never_holds_the_logits_of_more_than_a_chunk():
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            # A (D, V) is the transposed weight.
            if isinstance(out, torch.Tensor) and out.shape[1:] == (V,) and out.shape[0] != D:
                largest = max(largest, out.shape[0])
            return out

    head = LossHead.adopt(nn.Linear(D, V), z_loss=0.0, transform=LogitsTransform(), chunk=8)
    hidden = torch.randn(64, D, requires_grad=True)
    with Watch():
        loss, _ = head(hidden, labels=torch.randint(0, V, (64,)))
        loss.backward()
    assert largest == 8


def test_no_targets_is_a_loss_of_zero_with_zero_gradient():
    head = LossHead.adopt(nn.Linear(D, V), z_loss=1e-3, transform=LogitsTransform(), chunk=8)
    hidden = torch.randn(9, D, requires_grad=True)
    loss, _ = head(hidden, labels=torch.full((9,), -100))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().max() == 0 and head.weight.grad.abs().max() == 0


# Inductor takes half a minute. Of every run of the tests, engine/test_engine_options.py has it compile a whole model.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend):
    torch.manual_seed(0)
    head = LossHead.adopt(nn.Linear(D, V), z_loss=1e-3, transform=LogitsTransform(cap=5.0), chunk=16)
    hidden, labels = torch.randn(40, D, requires_grad=True), torch.randint(0, V, (40,))
    loss, _ = head(hidden, labels=labels)
    wanted = torch.autograd.grad(loss, [hidden, head.weight])
    compiled = torch.compile(lambda h, y: head(h, labels=y), fullgraph=True, backend=backend)
    loss_c, _ = compiled(hidden, labels)
    got = torch.autograd.grad(loss_c, [hidden, head.weight])
    torch.testing.assert_close(loss_c, loss)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_product_is_added_in_place_and_follows_the_rules_of_operators():
    torch.manual_seed(0)
    into, left, right = torch.randn(3, 4), torch.randn(3, 5), torch.randn(5, 4)
    torch.library.opcheck(_add_product, (into, left, right))
    expected, address = into + left @ right, into.data_ptr()
    _add_product(into, left, right)
    torch.testing.assert_close(into, expected)
    assert into.data_ptr() == address


def test_under_autocast_products_are_in_bf16_and_sums_in_fp32():
    torch.manual_seed(0)
    head, hidden, labels = nn.Linear(D, V), torch.randn(N, D, requires_grad=True), torch.randint(0, V, (N,))
    rounded = [t.detach().bfloat16().float().requires_grad_() for t in (hidden, head.weight, head.bias)]
    wanted, _, _ = reference(*rounded, labels, 0.0, LogitsTransform())
    wanted_grads = torch.autograd.grad(wanted, rounded)
    LossHead.adopt(head, z_loss=0.0, transform=LogitsTransform(), chunk=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = head(hidden, labels=labels)
    grads = torch.autograd.grad(loss, [hidden, head.weight, head.bias])
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=0)
    for got, want in zip(grads, wanted_grads, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
