"""The chunked loss under a teacher against full logits, torch's cross-entropy and its divergence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from millrace.models.heads import LogitsTransform
from millrace.pretrain.objectives.distil_loss import DistilHead, Taught, Terms

N, D, E, V, W, K = 37, 16, 12, 50, 56, 47
PLAIN = LogitsTransform()


def head_and_batch(terms, chunk, bias=False, dtype=torch.float64):
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias, dtype=dtype)
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    teacher = nn.Linear(E, W, bias=bias, dtype=dtype).requires_grad_(False)
    labels = torch.randint(0, K, (N,))
    labels[::5] = -100
    taught = Taught(3 * torch.randn(N, E, dtype=dtype), teacher.weight, teacher.bias)
    made = DistilHead.adopt(head, z_loss=terms.z_loss, transform=terms.transform, chunk=chunk)
    made.terms = terms
    return made, hidden, labels, taught


def reference(head, hidden, labels, taught, terms):
    """(loss, nll, divergence, largest logit) by the formulas, with all logits at once."""
    logits = terms.transform(F.linear(hidden, head.weight, head.bias))
    told = terms.theirs(F.linear(taught.hidden, taught.weight_WE, taught.bias_W))
    keep, heat = labels != -100, terms.temperature
    nll = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    p = torch.softmax(told[keep, :K] / heat, -1)
    divergence = F.kl_div(torch.log_softmax(logits[keep, :K] / heat, -1), p, reduction="sum")
    z_loss = terms.z_loss * torch.logsumexp(logits, -1)[keep].square().sum()
    return (1 - terms.weight) * nll + terms.weight * heat**2 * divergence + z_loss, nll, divergence, logits.max()


@pytest.mark.parametrize("chunk", [1, 10, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "terms",
    [
        Terms(0.5, 1.0, 0.0, K, PLAIN, PLAIN),
        Terms(0.3, 2.5, 1e-2, K, PLAIN, PLAIN),
        Terms(1.0, 4.0, 0.0, K, LogitsTransform(cap=3.0), LogitsTransform(factor=0.5)),
        Terms(0.7, 0.5, 1e-3, K, LogitsTransform(factor=0.25), LogitsTransform(cap=5.0)),
    ],
)
def test_equals_full_logits(terms, bias, chunk):
    head, hidden, labels, taught = head_and_batch(terms, chunk, bias)
    wanted, *others = reference(head, hidden, labels, taught, terms)
    parameters = [hidden, *head.parameters()]
    wanted_grads = torch.autograd.grad(0.3 * wanted, parameters)
    loss, metrics = head(hidden, labels=labels, taught=taught)
    grads = torch.autograd.grad(0.3 * loss, parameters)
    # The sums are kept in float32, hence not 1e-12.
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics.double(), torch.stack(others), rtol=1e-6, atol=0)
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_a_teacher_that_is_the_student_has_no_divergence_and_pulls_nowhere():
    head, hidden, labels, _ = head_and_batch(Terms(1.0, 2.0, 0.0, K, PLAIN, PLAIN), 8)
    loss, metrics = head(hidden, labels=labels, taught=Taught(hidden.detach(), head.weight.detach(), None))
    loss.backward()
    assert metrics[0] > 1 and abs(metrics[1]) < 1e-6
    assert hidden.grad.abs().max() < 1e-7 and head.weight.grad.abs().max() < 1e-6


def test_without_a_teacher_it_is_the_loss_of_the_text():
    head, hidden, labels, taught = head_and_batch(Terms(0.5, 2.0, 0.0, K, PLAIN, PLAIN), 8)
    loss, _ = head(hidden, labels=labels)
    torch.testing.assert_close(loss, head(hidden, labels=labels, taught=taught)[1][0])
    assert torch.equal(head(hidden), F.linear(hidden, head.weight))


def test_never_holds_the_logits_of_more_than_a_chunk():
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            # (D, V) and (E, W) are transposed weights.
            if isinstance(out, torch.Tensor) and out.shape[1:] in ((V,), (W,), (K,)) and out.shape[0] not in (D, E):
                largest = max(largest, out.shape[0])
            return out

    head, hidden, labels, taught = head_and_batch(Terms(0.5, 2.0, 0.0, K, PLAIN, PLAIN), 8)
    with Watch():
        loss, _ = head(hidden, labels=labels, taught=taught)
        loss.backward()
    assert largest == 8


def test_compiled_equals_eager():
    terms = Terms(0.5, 2.0, 1e-3, K, LogitsTransform(cap=5.0), PLAIN)
    head, hidden, labels, taught = head_and_batch(terms, 16, dtype=torch.float32)
    loss, _ = head(hidden, labels=labels, taught=taught)
    wanted = torch.autograd.grad(loss, [hidden, head.weight])
    compiled = torch.compile(lambda h, y, t: head(h, labels=y, taught=t), fullgraph=True)
    loss_c, _ = compiled(hidden, labels, taught)
    got = torch.autograd.grad(loss_c, [hidden, head.weight])
    torch.testing.assert_close(loss_c, loss)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
