"""Statistics and simulation, against what a run really consumes."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace.core.errors import UserError
from millrace.data.builder import Opened, Spec
from millrace.data.config import DataConfig
from millrace.data.corpus import Corpus
from millrace.data.simulate import PAGE, shuffle_quality, simulate
from millrace.data.stat import lengths, packing
from millrace.data.stream import Deal


def open_stream(corpus: Path, world: int = 1, **options: Any) -> Opened:
    config = DataConfig(manifest=str(corpus), **{"sequence_length": 48, "window": 32, "threads": 1} | options)
    return Opened(Spec(config=config, seed=4, deal=Deal(6, 1, 0, world)), None)


def test_lengths_count_every_sample(corpus: Path) -> None:
    costs = Corpus.load(str(corpus)).entries(np.arange(90)).tokens
    found = lengths(Corpus.load(str(corpus)))
    assert found.samples.sum() == 90 and found.positions.sum() == costs.sum()
    for low, high, samples, positions in zip(
        found.edges[:-1], found.edges[1:], found.samples, found.positions, strict=True
    ):
        here = costs[(costs >= low) & (costs < high)]
        assert (samples, positions) == (len(here), here.sum())


def test_packing_is_that_of_the_stream(corpus: Path) -> None:
    opened = open_stream(corpus)
    found, builder = packing(opened), opened.builder()
    used = rows = 0
    for frame, state in builder.steps(opened.state):
        spans = frame.arrays["row_spans"]
        used, rows = used + int((spans[:, 2] - spans[:, 1]).sum()), rows + 6
        if state.window >= found.windows:
            break
    builder.documents.close()
    assert found.rows <= rows < found.rows + 6
    assert found.efficiency == pytest.approx(used / (rows * 48), abs=0.03)


def test_simulation_reads_nothing_and_plans_what_a_run_consumes(
    corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = corpora.prepare_documents(tmp_path, corpora.make_documents(200))
    opened = open_stream(corpus)
    builder, sums = opened.builder(), hashlib.sha256()
    for frame, _ in itertools.islice(builder.steps(opened.state), 12):
        sums.update(frame.arrays["spans"].astype("<i8").tobytes())
    builder.documents.close()
    monkeypatch.setattr("millrace.data.reader.open_blob", lambda url: pytest.fail(f"{url} was opened"))
    for world in (1, 2, 3, 6):
        found = simulate(open_stream(corpus, world), 12, nodes=world)
        assert found.order == sums.hexdigest()
        assert found.shards_open == 1 and found.fetched_per_needed is not None
        size = (tmp_path / "documents.jsonl").stat().st_size
        assert size < PAGE and found.fetched_per_needed >= PAGE / size


def test_shuffle_quality_tells_order_from_disorder() -> None:
    rng = np.random.default_rng(1)
    assert shuffle_quality(np.arange(5000)) < 0.05
    assert shuffle_quality(rng.permutation(5000)) == pytest.approx(1, abs=0.01)
    blocks = np.concatenate([rng.permutation(500) + 500 * b for b in range(10)])
    assert 0.2 < shuffle_quality(blocks) < 0.8


def test_a_corpus_without_counts_cannot_be_planned(corpora: Any, tmp_path: Path) -> None:
    corpus = corpora.prepare_documents(tmp_path, corpora.make_documents(20), count_tokens=False)
    counted = corpora.prepare_documents(tmp_path / "b", corpora.make_documents(20))
    with pytest.raises(UserError, match="has no token counts; prepare it with count_tokens"):
        simulate(open_stream(corpus, tokenizer=str(counted / "tokenizer")), 2, nodes=1)


def test_epochs_of_a_simulated_stream_are_permutations(corpus: Path) -> None:
    opened = open_stream(corpus, window=90)
    stream, state = opened.plan(), opened.state
    seen: Counter[int] = Counter()
    while state.window == 0:
        step = stream.step(state)
        state = step.after
        if state.window == 0:
            seen.update(np.unique(np.concatenate(step.rows)[:, 0]).tolist())
    assert set(seen) <= set(range(90))
