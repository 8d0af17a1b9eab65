"""Recurrences on a CPU: a loop over time, scans and an LSTM; training steps on packed rows and on documents alone.

    python benchmarks/recurrences.py [--parts scans steps precisions] [--rounds 15] [--steps 5]

First h[t] = a[t] · h[t - 1] + x[t] forward and backward: the loop over time of transformers' RecurrentGemma, scans
that autograd goes back through, `millrace.models.recurrence.linear_scan` with several sizes of its chunks, and
torch.nn.LSTM of the same width. Then forward and backward passes of a small RecurrentGemma and Mamba-2 on documents of
about 150 tokens: as transformers computes them with a document in each row, with our functions in its place, and packed
best-fit. Last such passes on packed rows, of a Qwen3 too, in fp32, with weights in bf16, and in bf16 over fp32 weights.
Arms take turns in a new random order in every round. About 5 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor, nn

SIZES = [(4, 256, 256), (2, 2048, 256)]  # rows, positions, channels
CHUNKS = (4, 8, 16, 32, 64, 128)
LENGTH, ROWS, VOCABULARY = 512, 4, 2048
MODELS: dict[str, dict[str, Any]] = {
    "recurrent_gemma": {
        "hidden_size": 192, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 3,
        "num_key_value_heads": 1, "lru_width": 192, "attention_window_size": 256,
    },
    "mamba2": {
        "hidden_size": 192, "num_hidden_layers": 6, "num_heads": 12, "head_dim": 32, "state_size": 64, "n_groups": 1,
        "chunk_size": 64,
    },
}  # fmt: skip

PRECISIONS = ("qwen3", *MODELS)
MODELS["qwen3"] = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 3, "head_dim": 64,
    "num_key_value_heads": 3,
}  # fmt: skip

Arm = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=15, help="of the recurrences alone")
    parser.add_argument("--steps", type=int, default=5, help="rounds of the training steps")
    options = parser.parse_args()
    common.warn_if_busy()
    environment = common.environment()
    for part in options.parts:
        found = PARTS[part](options)
        path = common.save(f"recurrences_{part}", {"environment": environment, "models": MODELS, part: found})
        rows = [(size, *row) for size, arms in found.items() for row in _rows(arms)]
        common.report(part, ["of", "arm", "median", "quartiles", "times the first"], rows, path)


Found = dict[str, dict[str, dict[str, tuple[float, float, float]]]]  # by size or model, arm, and figure; quartiles


def _measure_scans(options: argparse.Namespace) -> Found:
    """Milliseconds."""
    sizes = {" x ".join(map(str, size)): recurrences(*size) for size in SIZES}
    return {name: _figures(turns(arms, options.rounds), lambda _, s: 1e3 * s) for name, arms in sizes.items()}


def _measure_steps(options: argparse.Namespace) -> Found:
    """Targets a second."""
    found = {}
    for kind in ("recurrent_gemma", "mamba2"):
        arms, targets = steps(kind)
        found[kind] = _figures(turns(arms, options.steps), lambda name, s, each=targets: each[name] / s)
    return found


def _measure_precisions(options: argparse.Namespace) -> Found:
    """Seconds."""
    return {kind: _figures(turns(precisions(kind), options.steps), lambda _, s: s) for kind in PRECISIONS}


PARTS = {"scans": _measure_scans, "steps": _measure_steps, "precisions": _measure_precisions}


def _figures(seconds: Mapping[str, list[float]], figure: Callable[[str, float], float]) -> dict[str, Any]:
    """Quartiles of every arm's figure, and of its rate in parts of the first arm's beside it in the same round."""
    first = next(iter(seconds))
    rates = {name: [figure(name, s) for s in found] for name, found in seconds.items()}
    rises = figure(first, 1.0) > figure(first, 2.0)  # a rate, not a time
    return {
        name: {
            "figure": common.quartiles(mine),
            "times_first": common.quartiles(
                [m / f if rises else f / m for m, f in zip(mine, rates[first], strict=True)]
            ),
        }
        for name, mine in rates.items()
    }


def _rows(arms: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name, f"{q[1]:,.2f}", f"{q[0]:,.2f} – {q[2]:,.2f}", "{1:.2f} ({0:.2f} – {2:.2f})".format(*arm["times_first"]))
        for name, arm in arms.items()
        for q in [arm["figure"]]
    ]


def turns(arms: Mapping[str, Arm], rounds: int) -> dict[str, list[float]]:
    """Seconds of every arm in each round, after one that is not timed."""
    order, names = random.Random(0), list(arms)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        order.shuffle(names)
        for name in names:
            began = time.perf_counter()
            arms[name]()
            if number:
                found[name].append(time.perf_counter() - began)
    return found


def recurrences(rows: int, length: int, width: int) -> dict[str, Arm]:
    """Forward and backward of each way."""
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    from millrace.models.recurrence import linear_scan

    random_ = torch.Generator().manual_seed(0)
    decay = (0.85 + 0.15 * torch.rand(rows, length, width, generator=random_)).requires_grad_()
    inputs = torch.randn(rows, length, width, generator=random_, requires_grad=True)
    reset = torch.zeros(rows, length, 1, dtype=torch.bool)
    lstm = nn.LSTM(width, width, batch_first=True)

    def loop() -> Tensor:
        found: Tensor = RecurrentGemmaRglru._rnn_scan(SimpleNamespace(), inputs, decay, reset, None)[0]
        return found

    ways: dict[str, Callable[[], Tensor]] = {
        "loop over time (transformers)": loop,
        "doubling scan, autograd": lambda: doubling(decay, inputs),
        "scan in chunks of 16, autograd": lambda: in_chunks(decay, inputs, 16),
        **{f"linear_scan, chunks of {chunk}": (lambda c=chunk: linear_scan(decay, inputs, c)) for chunk in CHUNKS},
        "linear_scan, chunks of √T": lambda: linear_scan(decay, inputs),
        "nn.LSTM": lambda: lstm(inputs)[0],
    }
    return {name: (lambda way=way: _backward(way().square().mean(), decay, inputs)) for name, way in ways.items()}


def doubling(decay: Tensor, inputs: Tensor) -> Tensor:
    """Hillis and Steele's scan: log2 T steps on all positions."""
    step = 1
    while step < inputs.shape[1]:
        inputs = torch.cat([inputs[:, :step], inputs[:, step:] + decay[:, step:] * inputs[:, :-step]], 1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], 1)
        step *= 2
    return inputs


def in_chunks(decay: Tensor, inputs: Tensor, chunk: int) -> Tensor:
    """Sequential inside chunks, all chunks at once, then over chunks; autograd goes back through every step."""
    rows, length, width = inputs.shape
    decays, each = (t.view(rows, length // chunk, chunk, width).unbind(2) for t in (decay, inputs))
    states, products = [each[0]], [decays[0]]
    for at in range(1, chunk):
        states.append(decays[at] * states[-1] + each[at])
        products.append(products[-1] * decays[at])
    ends, through, starts = states[-1].unbind(1), products[-1].unbind(1), [torch.zeros_like(inputs[:, 0])]
    for at in range(length // chunk - 1):
        starts.append(through[at] * starts[-1] + ends[at])
    found = torch.stack(states, 2) + torch.stack(products, 2) * torch.stack(starts, 1)[:, :, None]
    return found.reshape(rows, length, width)


def steps(kind: str) -> tuple[dict[str, Arm], dict[str, int]]:
    """Forward and backward of a batch in each way, and its targets."""
    from transformers import AutoModelForCausalLM

    from millrace.data.packing import pack
    from millrace.models.bridge import build_model
    from millrace.models.config import ModelConfig
    from millrace.pretrain.objectives.causal_lm import CausalLMModule
    from millrace.pretrain.objectives.config import CausalLMConfig

    ours = build_model(ModelConfig(kind=kind, config=MODELS[kind]), VOCABULARY, LENGTH, 0)
    theirs = AutoModelForCausalLM.from_config(ours.config, attn_implementation=ours.config._attn_implementation)
    theirs.load_state_dict(ours.state_dict())
    costs = _costs()
    modules = {name: CausalLMModule(model.train(), CausalLMConfig()) for name, model in
               {"ours": ours, "transformers": theirs}.items()}  # fmt: skip
    batches = {"alone": _batch(pack(costs, LENGTH, key=1, alone=True)), "packed": _batch(pack(costs, LENGTH, key=1))}
    ways = {"transformers, alone": "alone", "ours, alone": "alone", "ours, packed": "packed"}

    def step(module: Any, batch: Any) -> None:
        inputs = module.inputs(batch, torch.device("cpu"))
        _backward(module(**inputs)[0], *module.parameters())

    arms = {
        name: (lambda n=name, r=rows: step(modules[n.partition(",")[0]], batches[r])) for name, rows in ways.items()
    }
    return arms, {name: int((batches[rows].labels_BT != -100).sum()) for name, rows in ways.items()}


def precisions(kind: str) -> dict[str, Arm]:
    """Forward and backward of the same packed rows in each precision."""
    from millrace.data.packing import pack
    from millrace.models.bridge import build_model
    from millrace.models.config import ModelConfig
    from millrace.pretrain.objectives.causal_lm import CausalLMModule
    from millrace.pretrain.objectives.config import CausalLMConfig

    def build() -> nn.Module:
        return CausalLMModule(build_model(ModelConfig(kind=kind, config=MODELS[kind]), VOCABULARY, LENGTH, 0), head)

    def step(module: Any, autocast: bool) -> None:
        inputs = module.inputs(batch, torch.device("cpu"))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = module(**inputs)[0]
        _backward(loss, *module.parameters())

    head = CausalLMConfig()
    batch = _batch(pack(_costs(), LENGTH, key=1))
    whole, low = build(), build().to(torch.bfloat16)
    return {
        "fp32": lambda: step(whole, False),
        "bf16 weights": lambda: step(low, False),
        "autocast": lambda: step(whole, True),
    }


def _costs() -> np.ndarray:
    """Positions of documents."""
    return np.random.default_rng(0).lognormal(np.log(120), 0.7, 400).astype(np.int64).clip(2, LENGTH)


def _batch(packs: Any) -> Any:
    """The first ROWS rows, filled with random tokens."""
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels, positions, lens = torch.full_like(ids, -100), torch.zeros_like(ids), []
    for row in range(ROWS):
        spans = packs.spans[packs.offsets[row] : packs.offsets[row + 1]]
        lens.append([int(end - start) for _, start, end in spans])
        used = sum(lens[-1])
        labels[row, :used] = ids[row, :used].roll(-1)
        positions[row, :used] = torch.cat([torch.arange(size) for size in lens[-1]])
    return SimpleNamespace(input_ids_BT=ids, labels_BT=labels, position_ids_BT=positions, seq_lens=lens)


def _backward(loss: Tensor, *leaves: Tensor) -> None:
    for leaf in leaves:
        leaf.grad = None
    loss.backward()


if __name__ == "__main__":
    main()
