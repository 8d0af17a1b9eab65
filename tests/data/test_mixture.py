"""The mixture against a naive one that draws sample by sample, and what a run does when it changes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.core.config import load_config
from millrace.core.errors import UserError
from millrace.data.config import DataConfig, MixtureConfig, Weights
from millrace.data.corpus import Corpus, Source
from millrace.data.loader import Loader, build_loader
from millrace.data.mixture import BLOCK, Mixture, components, counts
from millrace.data.order import Growth, Order, derive_key
from millrace.data.state import LoaderState, Stage

LENGTH = 48
SOURCES = [
    Source("books", 0, 0, 100, 5000, 1000),
    Source("web", 0, 1, 400, 9000, 2000),
    Source("code", 1, 0, 10, 90, 30),
]


@pytest.fixture(scope="module")
def folders(corpora: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three manifests of 30, 50 and 20 documents with one tokenizer."""
    folder = tmp_path_factory.mktemp("mixture")
    first = corpora.prepare_documents(folder / "a", corpora.make_documents(30, seed=1), name="a")
    more = {"tokenizer": str(first / "tokenizer")}
    return [
        str(first),
        *(
            str(corpora.prepare_documents(folder / name, corpora.make_documents(count, seed=count), name=name, **more))
            for name, count in (("b", 50), ("c", 20))
        ),
    ]


def names(folders: list[str]) -> list[str]:
    return [source.name for source in Corpus.load(folders).sources()]


def stage(corpus: Corpus, mixed: tuple[int, ...], start: int = 0, window: int = 16) -> Stage:
    return Stage(
        start_window=start,
        manifests=corpus.fingerprints,
        components=tuple(source.name for source in corpus.sources()),
        counts=mixed,
        batch=4,
        sequence_length=LENGTH,
        window=window,
        shuffle_blocks=4,
        pack=True,
    )


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        (Weights(weights={"books": 3, "web": 1, "code": 0}), [3, 1, 0]),
        (Weights(temperature=1.0), [1000, 2000, 30]),
        (Weights(temperature=2.0), [1000**0.5, 2000**0.5, 30**0.5]),
        (Weights(tokens={"books": "1k", "web": 500, "code": 500}), [2, 1, 1]),
        (Weights(epochs={"books": 2, "web": 0.5, "code": 10}), [2000, 1000, 300]),
    ],
)
def test_counts_give_the_wanted_shares_of_tokens(weights: Weights, shares: list[float]) -> None:
    found = np.array(counts(weights, SOURCES))
    assert found.sum() == BLOCK
    tokens = found * np.array([10, 5, 3])
    wanted = np.array(shares) / sum(shares)
    assert np.allclose(tokens / tokens.sum(), wanted, atol=1e-4)
    assert (found[wanted > 0] > 0).all() and (found[wanted == 0] == 0).all()


def test_a_tiny_share_is_drawn_all_the_same() -> None:
    found = counts(Weights(weights={"books": 1, "web": 1, "code": 1e-9}), SOURCES)
    assert found[2] == 1 and sum(found) == BLOCK


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"weights": {"book": 1}}, "data.mixture.weights names 'book', .* did you mean 'books'"),
        ({"weights": {"books": 1, "web": 1}}, "says nothing of the source 'code'; write code = 0"),
        ({"weights": {"books": 0, "web": 0, "code": 0}}, "leaves every source out"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        counts(Weights(**weights), SOURCES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights = {a = 1}\nepochs = {a = 1}", "weights and epochs are two ways"),
        ("weights = {a = -1}", "weights.a = -1 must be a number, 0 or more"),
        ("temperature = -1.0", "must be above 0"),
        ("schedule = [{at = '5 steps', temperature = 1.0}]", "schedule needs shares to begin with"),
        ("temperature = 2.0\nschedule = [{temperature = 1.0}]", "cannot read ''"),
        ("temperature = 2.0\nschedule = [{at = '5 min', temperature = 1.0}]", "give steps, or tokens"),
        ("temperature = 2.0\nschedule = [{at = '5 steps'}]", "gives no shares"),
        ("temperature = 2.0\nschedule = [{at = '5 steps', weight = {a = 1}}]", "unknown key 'weight'"),
        (
            "temperature = 2.0\nschedule = [{at = '5 steps', temperature = 1.0}, {at = '5 steps', temperature = 3.0}]",
            "must be later than '5 steps'",
        ),
    ],
)
def test_mistakes_in_the_section_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(f"[mixture]\n{text}\n")
    with pytest.raises(UserError, match=message):
        load_config(DataConfig, tmp_path / "c.toml")


STAGES = st.lists(
    st.tuples(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), st.integers(1, 20)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=STAGES, window=st.integers(1, 40), seed=st.integers(0, 2**63))
def test_any_window_equals_drawing_one_by_one(
    folders: list[str], parts: list[tuple[list[int], int]], window: int, seed: int
) -> None:
    corpus = Corpus.load(folders)
    mixture = Mixture(corpus, components(corpus, weighted=True), seed)
    orders = [
        Order([Growth(0, corpus.blocks(corpus.fingerprints, s))], derive_key(seed, n) if n else seed, 4)
        for n, s in enumerate(corpus.sources())
    ]
    cursors = [0, 0, 0]
    stages: tuple[Stage, ...] = ()
    at = 0
    for mixed, windows in parts:
        stages = (*stages, stage(corpus, tuple(mixed), at, window))
        drawn: list[int] = []
        block: list[int] = []
        for _ in range(windows * window):
            if not block:  # spread evenly: the component that is furthest behind its share, the earlier one on a tie
                place = [(k + 0.5) / n for n in mixed for k in range(n)]
                which = [c for c, n in enumerate(mixed) for _ in range(n)]
                block = [c for _, c in sorted(zip(place, which, strict=True))]
            part = block.pop(0)
            drawn.append(orders[part].sample_at(cursors[part]))
            cursors[part] += 1
        assert mixture.samples(stages, 0, len(drawn)).tolist() == drawn
        middle = len(drawn) // 2
        assert mixture.samples(stages, middle, len(drawn)).tolist() == drawn[middle:]
        at += windows


def load(folders: list[str], **more: Any) -> Loader:
    world, rank, rows, micro = (more.pop(k, d) for k, d in (("world", 1), ("rank", 0), ("rows", 6), ("micro", 1)))
    state, mixture = more.pop("state", None), more.pop("mixture", {})
    values = {"manifest": folders, "sequence_length": LENGTH, "prefetch": 0, "window": 32} | more
    config = DataConfig(mixture=MixtureConfig(**mixture), **values)
    return build_loader(config, seed=5, batch_rows=rows, micro_batch=micro, rank=rank, world=world, state=state)


def take(loader: Iterator[Any], steps: int) -> list[Any]:
    return [next(loader) for _ in range(steps)]


def test_without_weights_all_manifests_are_one_shuffled_corpus(folders: list[str]) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    corpus = Corpus.load(folders)
    for batch in load(folders, rows=1, window=10**6):
        seen.update((sample, at) for sample, start, end in batch.spans for at in range(start, end))
        if batch.state.window == 1:
            break
    everything = [(m << 40) + i for m, manifest in enumerate(corpus.manifests) for i in range(manifest.samples)]
    costs = corpus.entries(np.array(everything)).tokens
    assert seen == Counter(
        {(s, at): 1 for s, cost in zip(everything, costs.tolist(), strict=True) for at in range(cost)}
    )


def test_shares_of_a_stream_are_those_wanted(folders: list[str]) -> None:
    wanted = dict(zip(names(folders), (5.0, 2.0, 1.0), strict=True))
    found: Counter[int] = Counter()
    for batch in take(load(folders, mixture={"weights": wanted}), 200):
        found.update({sample >> 40: 0 for sample, _, _ in batch.spans})
        for sample, start, end in batch.spans:
            found[sample >> 40] += end - start
    shares = np.array([found[n] for n in range(3)]) / sum(found.values())
    assert np.allclose(shares, np.array([5, 2, 1]) / 8, atol=0.03)


def schedule(folders: list[str]) -> dict[str, Any]:
    a, b, c = names(folders)
    later = [{"at": "7 steps", "weights": {a: 0, b: 1, c: 1}}, {"at": "12 steps", "epochs": {a: 1, b: 2, c: 3}}]
    return {"weights": {a: 3.0, b: 1.0, c: 0.0}, "schedule": later}


def test_a_schedule_changes_the_shares_at_a_window_border(folders: list[str]) -> None:
    batches = take(load(folders, mixture=schedule(folders)), 30)
    stages = batches[-1].state.stages
    assert len(stages) == 3 and stages[0].start_window == 0
    assert [s.counts[0] > 0 for s in stages] == [True, False, True]
    for number, (at, one) in enumerate(zip((7, 12), stages[1:], strict=True)):
        begins = next(i for i, b in enumerate(batches) if len(b.state.stages) > number + 1)
        assert begins >= at and batches[begins].state.window >= one.start_window
        assert batches[at - 1].state.window <= one.start_window  # at the first border after the step was reached


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    segments=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(0, 9)), min_size=1, max_size=6),
    window=st.integers(1, 120),
    pack=st.booleans(),
    tokens=st.booleans(),
)
def test_resume_at_any_point_and_world(
    folders: list[str], segments: list[tuple[int, int]], window: int, pack: bool, tokens: bool
) -> None:
    """Stopped after each segment and resumed at another world: the stream, and its stages, of one unstopped run."""
    mixture = schedule(folders)
    if tokens:
        later = [entry | {"at": at} for entry, at in zip(mixture["schedule"], ("900 tokens", "2k tokens"), strict=True)]
        mixture = mixture | {"schedule": later}
    options: dict[str, Any] = {"rows": 24, "window": window, "pack": pack, "mixture": mixture}
    state, seen, states = None, [], []
    for world, count in segments:
        with load(folders, **options, world=world, rank=world - 1, micro=24 // world, state=state) as loader:
            for batch in take(loader, count):
                seen.append(batch.spans)
                states.append(batch.state)
            state = LoaderState.from_dict(json.loads(json.dumps(loader.state.to_dict())))
    whole = take(load(folders, **options, micro=24), len(seen))
    assert seen == [batch.spans for batch in whole]
    assert states == [batch.state for batch in whole]


def documents(batches: list[Any]) -> Counter[tuple[int, int]]:
    return Counter((s, at) for b in batches for s, start, end in b.spans for at in range(start, end))


def until(loader: Loader, window: int) -> list[Any]:
    found = []
    while loader.state.window < window or (loader.state.window == window and loader.state.packs_done):
        found.append(next(loader))
    return found


@pytest.mark.parametrize("change", [{"rows": 4}, {"sequence_length": 20}, {"rows": 8, "sequence_length": 64}])
def test_batch_and_length_may_change_at_a_window_border(folders: list[str], change: dict[str, int]) -> None:
    """The step before the border is filled up with empty rows; no token is lost or repeated."""
    first = take(load(folders), 5)
    state = first[-1].state
    assert state.packs_done
    with load(folders, state=state, micro=2, **change) as loader:
        rest = take(loader, 40)
    final = rest[-1].state
    assert len(final.stages) == 2 and final.stages[1].start_window == state.window + 1
    shapes = [(len(b.micro_batches) * 2, b.micro_batches[0].input_ids_BT.shape[1]) for b in rest]
    assert shapes[0] == (6, LENGTH) and shapes[-1] == (change.get("rows", 6), change.get("sequence_length", LENGTH))
    corpus = Corpus.load(folders)
    mixture = Mixture(corpus, components(corpus, weighted=False), 5)
    wanted: Counter[int] = Counter()
    for number in range(final.window):
        begun = [s for s in final.stages if s.start_window <= number]
        start = (number - begun[-1].start_window) * 32
        wanted.update(mixture.samples(tuple(begun), start, start + 32).tolist())
    costs = dict(zip(wanted, corpus.entries(np.array(list(wanted))).tokens.tolist(), strict=True))
    found = documents(first + [b for b in rest if b.state.window < final.window or not b.state.packs_done])
    whole = Counter({(s, at): n for s, n in wanted.items() for at in range(costs[s])})
    beyond = documents(rest)
    assert not found - whole and not whole - (beyond + documents(first))


def test_changed_shares_begin_a_stage_and_other_components_are_refused(folders: list[str]) -> None:
    a, b, c = names(folders)
    state = take(load(folders, mixture={"weights": {a: 1.0, b: 1.0, c: 1.0}}), 5)[-1].state
    after = take(load(folders, mixture={"weights": {a: 1.0, b: 0.0, c: 0.0}}, state=state), 30)[-1].state
    assert [s.counts[1] > 0 for s in after.stages] == [True, False]
    assert after.stages[1].start_window == state.window + (state.packs_done > 0)
    with pytest.raises(UserError, match="cannot resume the data stream: components was"):
        load(folders, state=state)
    with pytest.raises(UserError, match="components was"):
        load([folders[0], folders[2], folders[1]], mixture={"temperature": 1.0}, state=state)
    other = replace(state, stages=(replace(state.stages[0], manifests=("0" * 64, *state.stages[0].manifests[1:])),))
    with pytest.raises(UserError, match="is not the same with shards appended"):
        load(folders, mixture={"temperature": 1.0}, state=other)


def test_manifests_of_different_tokenizers_do_not_go_together(folders: list[str], corpora: Any, tmp_path: Path) -> None:
    other = corpora.prepare_documents(tmp_path, corpora.make_documents(30, seed=9), vocab_size=280)
    with pytest.raises(UserError, match="do not go together.*prepare them with the same --tokenizer"):
        load([folders[0], str(other)])


def test_a_manifest_may_join_later(folders: list[str]) -> None:
    """What joins comes at the end of the epoch under way, then everything is mixed."""
    first = take(load(folders[:1], rows=1, window=8), 3)
    state = first[-1].state
    rest = take(load(folders, rows=1, window=8, state=state), 400)
    stages = rest[-1].state.stages
    assert [len(s.manifests) for s in stages] == [1, 3]
    corpus = Corpus.load(folders)
    mixture = Mixture(corpus, components(corpus, weighted=False), 5)
    before = mixture.samples(stages[:1], 0, 8 * stages[1].start_window).tolist()
    after = mixture.samples(stages, 0, 100 - len(before) + 100).tolist()
    assert (
        sorted(before + after[: 100 - len(before)]) == sorted(set(before + after)) and len(set(before + after)) == 100
    )
    assert set(after[: 30 - len(before)]) | set(before) == set(range(30))
