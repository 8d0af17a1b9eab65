"""A step's gradient is per token over the global batch, whatever the accumulation and the number of ranks."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def splits(scenarios: Any) -> dict[str, Any]:
    """Eight ragged rows as 1 rank x 8 accumulations, 2 x 4, 4 x 2, and as one micro-batch of eight."""
    found = {}
    for world, ways in (
        (1, {"1x8": [], "one micro-batch": ["train.micro_batch=8"]}),
        (2, {"2x4": [], "2x4 zero3": ["engine.zero_stage=3", "engine.persistence_threshold=0"]}),
        (4, {"4x2": [], "4x2 zero0": ["engine.zero_stage=0"]}),
    ):
        jobs = [
            {"name": name, "overrides": ["engine.zero_stage=2", *more], "steps": 2, "gradient": True}
            for name, more in ways.items()
        ]
        found |= scenarios(world, jobs)
    return found


@pytest.mark.parametrize("name", ["one micro-batch", "2x4", "2x4 zero3", "4x2", "4x2 zero0"])
def test_same_loss_and_gradient(splits: dict[str, Any], name: str) -> None:
    reference, other = splits["1x8"], splits[name]
    assert other["spans"] == reference["spans"]
    assert other["targets"] == reference["targets"] and len(set(reference["row_targets"])) > 1  # ragged
    for a, b in zip(reference["losses"], other["losses"], strict=True):
        assert float.fromhex(b) == pytest.approx(float.fromhex(a), rel=1e-6)
    largest = max(abs(g) for g in reference["gradient"])
    worst = max(abs(a - b) for a, b in zip(reference["gradient"], other["gradient"], strict=True))
    assert worst / largest < 1e-6


def test_it_is_the_mean_over_targets_of_the_whole_batch(splits: dict[str, Any], config_file: Any) -> None:
    """Against plain autograd of `transformers`' logits, document by document, in this process."""
    import torch
    import torch.nn.functional as F

    from millrace.core.config import load_config
    from millrace.data.loader import build_loader
    from millrace.models.bridge import build_model
    from millrace.pretrain.config import PretrainConfig

    config = load_config(PretrainConfig, config_file)
    with build_loader(config.data, seed=0, batch_rows=8, micro_batch=1, rank=0, world=1) as loader:
        batch, vocab = next(loader), loader.tokenizer.vocab_size
    model = build_model(config.model, vocab, config.data.sequence_length, config.run.seed)
    total, targets = torch.zeros(()), 0
    for micro in batch.micro_batches:
        start = 0
        for length in micro.seq_lens[0]:
            part = slice(start, start + length)
            logits = model(input_ids=micro.input_ids_BT[:, part], use_cache=False).logits[0]
            total = total + F.cross_entropy(logits, micro.labels_BT[0, part], ignore_index=-100, reduction="sum")
            targets += int((micro.labels_BT[0, part] != -100).sum())
            start += length
    loss = total / targets
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters())])
    assert targets == splits["1x8"]["targets"][0]
    assert loss.item() == pytest.approx(float.fromhex(splits["1x8"]["losses"][0]), rel=1e-6)
    got = torch.tensor(splits["1x8"]["gradient"])
    assert (got - gradient).abs().max() / gradient.abs().max() < 2e-6
