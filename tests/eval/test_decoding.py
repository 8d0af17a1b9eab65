"""Writing with a cache and in batches against a whole forward pass for every token of every row alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.eval.decoding import Sampling, Wanted, decode, draw
from tests.handmade import small_model

PROMPTS = [np.array([5, 17, 9]), np.array([4]), np.array([8, 8, 30, 2, 7, 1, 44])]
NULL = np.array([3, 6])
KINDS: dict[str, Any] = {"qwen3": {}, "gpt2": {}, "mistral": {"num_key_value_heads": 2, "sliding_window": 6}}
WANTED = Wanted(range(100, 140), frozenset(), 6)


def alone(model: Any, prompt: np.ndarray, row: int, wanted: Wanted, how: Sampling) -> list[int]:
    """Row number `row`, token by token, without cache or padding, by the formula."""
    ids, null, written = prompt.tolist(), NULL.tolist(), []
    draws = np.random.default_rng([how.seed, row]).random(wanted.most)
    for step in range(wanted.most):
        allowed = torch.tensor(list(wanted.allowed))
        given, without = (model(input_ids=torch.tensor([now])).logits[:, -1, allowed] for now in (ids, null))
        logits = without + (1 + how.guidance) * (given - without)
        token = int(allowed[draw(logits, draws[step : step + 1], how)])
        if token in wanted.ends:
            break
        written.append(token)
        ids, null = [*ids, token], [*null, token]
    return written


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how", [Sampling(), Sampling(guidance=2.0, seed=1), Sampling(temperature=0), Sampling(guidance=1.0, top_k=3)]
)
def test_cached_batches_are_rows_alone(kind: str, how: Sampling) -> None:
    model = small_model(kind, **KINDS[kind])
    with torch.no_grad():
        expected = [alone(model, prompt, row, WANTED, how) for row, prompt in enumerate(PROMPTS)]
    assert decode(model, PROMPTS, NULL, WANTED, how) == expected
    assert len({tuple(row) for row in expected}) > 1


def test_rows_end_each_for_itself() -> None:
    model = small_model()
    wanted = Wanted(range(100, 104), frozenset([101]), 12)
    with torch.no_grad():
        expected = [alone(model, prompt, row, wanted, Sampling()) for row, prompt in enumerate(PROMPTS)]
    found = decode(model, PROMPTS, NULL, wanted, Sampling())
    assert found == expected
    assert len({len(row) for row in found}) > 1 and not any(101 in row for row in found)


@given(st.integers(0, 2**32), st.integers(0, 5), st.sampled_from([0.0, 0.5, 2.0]))
def test_nothing_but_what_is_allowed_is_drawn(seed: int, top_k: int, temperature: float) -> None:
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(size=(4, 7)) * 20)
    chosen = draw(logits, random.random(4), Sampling(temperature=temperature, top_k=top_k))
    ranks = (logits > logits.gather(1, chosen[:, None])).sum(1)
    assert chosen.min() >= 0 and chosen.max() < 7
    assert temperature > 0 or (ranks == 0).all()
    assert not top_k or (ranks < top_k).all()


def test_draws_have_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(20000, 4)
    uniform = np.random.default_rng(0).random(20000)
    found = torch.bincount(draw(logits, uniform, Sampling(temperature=2.0)), minlength=4) / 20000
    torch.testing.assert_close(found, torch.softmax(logits[0] / 2, 0), rtol=0, atol=0.015)  # four deviations


def test_the_ends_of_the_numbers_are_codes() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]] * 2)
    assert draw(logits, np.array([0.0, np.nextafter(1.0, 0.0)]), Sampling()).tolist() == [0, 1]


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="guidance -1"):
        Sampling(guidance=-1)
