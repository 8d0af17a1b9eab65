"""Held-out loss of the model in training, per token and in bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from millrace.engine.engine import Engine


@dataclass(frozen=True)
class HeldOut:
    """`loss` in nats per token; `bpb` in bits per byte of text, which tokenizers can be compared by.

    `averages` are the objective's own measures per target (`averages = ("accuracy",)` names what its metrics hold
    behind the summed loss and the largest logit).
    """

    loss: float
    bpb: float
    tokens: int
    bytes: int
    averages: dict[str, float]


@torch.no_grad()
def evaluate(engine: Engine, batches: Iterable[tuple[Any, int]]) -> HeldOut:
    """The mean over all ranks' batches (micro-batch, bytes it covers); every rank must have as many.

    Call it on every rank.
    """
    engine.ds.eval()
    nll, tokens, size = 0.0, 0, 0
    names = getattr(engine.objective, "averages", ())
    sums = [0.0] * len(names)
    for batch, covered in batches:
        _, metrics = engine.forward(batch)
        nll += float(metrics[0])
        sums = [have + float(more) for have, more in zip(sums, metrics[2:], strict=True)]
        tokens += int((batch.labels_BT != -100).sum())
        size += covered
    engine.ds.train()
    nll, all_tokens, all_bytes, *sums = engine.world.sum(nll, tokens, size, *sums)
    return HeldOut(
        loss=nll / max(all_tokens, 1),
        bpb=nll / math.log(2) / max(all_bytes, 1),
        tokens=int(all_tokens),
        bytes=int(all_bytes),
        averages={name: value / max(all_tokens, 1) for name, value in zip(names, sums, strict=True)},
    )
