"""A stream at any number of nodes, planned without reading data: order, shuffle, what is open, what is fetched."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from millrace.data.builder import Opened
from millrace.data.corpus import Corpus
from millrace.data.stream import Step

PAGE = 2**20  # bytes of a remote shard that are fetched and cached together
_BY_OFFSET = ("jsonl", "text", "tar", "mds", "megatron", "folder")  # a place is (offset, length)


@dataclass(frozen=True)
class Simulated:
    """What was seen while `steps` steps were planned for one rank.

    `shuffle`: entropy of the distances between consecutive samples, over that of a random permutation of them.
    `shards_open`: most shards between whose first and last use a step lies. `fetched_per_needed`: bytes that a node
    fetches from a remote store over the bytes that its ranks use (None: unknown for these formats).
    """

    steps: int
    rows: int
    samples: int
    tokens: int
    efficiency: float
    shuffle: float
    shards_per_step: float
    shards_open: int
    fetched_per_needed: float | None
    state_bytes: int
    seconds: float
    start_seconds: float
    peak_bytes: int
    order: str  # SHA-256 of all (sample, start, end) in order


def simulate(opened: Opened, steps: int, nodes: int, start_seconds: float = 0.0) -> Simulated:
    """Plan `steps` steps from where `opened` stands.

    Raises:
        UserError: as `Opened.plan`.
    """
    import hashlib

    stream, state, deal = opened.plan(), opened.state, opened.spec.deal
    began, order = time.perf_counter(), hashlib.sha256()
    planned: list[Step] = []
    for _ in range(steps):
        step = stream.step(state)
        state = step.after
        planned.append(step)
    seconds = time.perf_counter() - began
    spans = [np.concatenate(step.rows) for step in planned]
    for part in spans:
        order.update(np.ascontiguousarray(part[:, :3], "<i8").tobytes())
    flat = np.concatenate(spans)
    used, rows = int((flat[:, 2] - flat[:, 1]).sum()), sum(len(step.rows) for step in planned)
    return Simulated(
        steps=steps,
        rows=rows,
        samples=len(np.unique(flat[:, 0])),
        tokens=used,
        efficiency=used / max(sum(len(s.rows) * s.sequence_length for s in planned), 1),
        shuffle=shuffle_quality(flat[:, 0]),
        shards_per_step=float(np.mean([len(np.unique(opened.corpus.shard_of(part[:, 0]))) for part in spans])),
        shards_open=_open_at_once(opened.corpus, spans),
        fetched_per_needed=_fetched(opened.corpus, planned, deal, nodes),
        state_bytes=len(json.dumps(state.to_dict())),
        seconds=seconds,
        start_seconds=start_seconds,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        order=order.hexdigest(),
    )


def shuffle_quality(samples: np.ndarray) -> float:
    """Entropy of |difference| of consecutive samples, in 64 bins, over that of a random permutation of them."""
    if len(samples) < 3:
        return 1.0
    top = float(samples.max() - samples.min()) + 1

    def entropy(order: np.ndarray) -> float:
        counts = np.histogram(np.abs(np.diff(order)), bins=64, range=(0, top))[0]
        share = counts[counts > 0] / counts.sum()
        return float(-(share * np.log(share)).sum())

    random = entropy(np.random.default_rng(0).permutation(samples))
    return entropy(samples) / random if random else 1.0


def _open_at_once(corpus: Corpus, spans: list[np.ndarray]) -> int:
    """Shards in use at the busiest step."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, part in enumerate(spans):
        for shard in np.unique(corpus.shard_of(part[:, 0])).tolist():
            first.setdefault(shard, number)
            last[shard] = number
    changes = np.zeros(len(spans) + 1, np.int64)
    for shard, number in first.items():
        changes[number] += 1
        changes[last[shard] + 1] -= 1
    return int(changes.cumsum().max())


def _fetched(corpus: Corpus, planned: list[Step], deal: Any, nodes: int) -> float | None:
    """For the first node; None where no shard is read by byte offset."""
    ranks = range(max(1, deal.world // nodes))
    mine = [r for step in planned for i, r in enumerate(step.rows) if (i // deal.micro_batch) % deal.world in ranks]
    if not sum(map(len, mine)):
        return None
    samples = np.unique(np.concatenate(mine)[:, 0])
    shard = corpus.shard_of(samples)
    kinds = [manifest.shards[number].kind for manifest, number in map(corpus.shard, shard.tolist())]
    by_offset = np.array([kind.partition(".")[0] in _BY_OFFSET for kind in kinds])
    if not by_offset.any():
        return None
    entries = corpus.entries(samples)
    at, extent, shard = entries.at[by_offset], entries.extent[by_offset], shard[by_offset]
    first, last = at // PAGE, (at + np.maximum(extent, 1) - 1) // PAGE
    pages = {
        (s, p) for s, a, b in zip(shard.tolist(), first.tolist(), last.tolist(), strict=True) for p in range(a, b + 1)
    }
    return len(pages) * PAGE / max(int(extent.sum()), 1)
