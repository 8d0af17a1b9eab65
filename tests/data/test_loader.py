from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.data.batch import IGNORED, StepBatch, spans_sha
from millrace.data.config import DataConfig
from millrace.data.documents import Documents
from millrace.data.loader import Loader, build_loader
from millrace.data.manifest import Manifest
from millrace.data.order import Blocks, Growth, Order
from millrace.data.prepare import PrepareConfig, prepare
from millrace.data.state import LoaderState
from millrace.data.tokenizer import Tokenizer, load_tokenizer

LENGTH = 48


def configure(corpus: Path, **options: Any) -> DataConfig:
    return DataConfig(**{"manifest": str(corpus), "sequence_length": LENGTH, "prefetch": 0} | options)


def load(corpus: Path, *, rows: int = 6, rank: int = 0, world: int = 1, micro: int = 1, **more: Any) -> Loader:
    state, seed = more.pop("state", None), more.pop("seed", 11)
    config = configure(corpus, **more)
    return build_loader(config, seed=seed, batch_rows=rows, micro_batch=micro, rank=rank, world=world, state=state)


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("millrace")]


def steps(loader: Iterator[StepBatch], count: int) -> list[StepBatch]:
    return [next(loader) for _ in range(count)]


def bordered(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode([text])[0].tolist(), tokenizer.eos_id]


@pytest.mark.parametrize("pack", [True, False])
def test_tokens_are_those_of_the_documents(corpus: Path, documents: list[str], pack: bool) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    for batch in steps(load(corpus, micro=3, pack=pack, window=32), 20):
        targets = 0
        for micro in batch.micro_batches:
            assert micro.input_ids_BT.shape == micro.labels_BT.shape == (3, LENGTH)
            assert micro.input_ids_BT.dtype == micro.labels_BT.dtype == micro.position_ids_BT.dtype == torch.int64
            for row, spans in enumerate(micro.spans):
                assert micro.seq_lens[row] == [end - start for _, start, end in spans]
                at = 0
                for sample, start, end in spans:
                    document, here = bordered(tokenizer, documents[sample]), slice(at, at + end - start)
                    assert micro.input_ids_BT[row, here].tolist() == document[start:end]
                    assert micro.labels_BT[row, here].tolist() == document[start + 1 : end + 1]
                    assert micro.position_ids_BT[row, here].tolist() == list(range(end - start))
                    at += end - start
                assert (micro.labels_BT[row, at:] == IGNORED).all()
                targets += at
        assert batch.local_tokens == targets


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_holds_every_target_exactly_once(corpus: Path, pack: bool) -> None:
    """A window of all 90 samples is an epoch."""
    manifest = Manifest.load(corpus)
    seen: Counter[tuple[int, int]] = Counter()
    for batch in load(corpus, rows=1, window=10**6, pack=pack):
        seen.update((sample, at) for sample, start, end in batch.spans for at in range(start, end))
        if batch.state.window == 1:
            break
    costs = manifest.entries(np.arange(90)).tokens
    assert seen == Counter({(sample, at): 1 for sample in range(90) for at in range(costs[sample])})
    assert seen.total() == manifest.tokens


def test_windows_follow_the_order_over_epochs(corpus: Path) -> None:
    manifest = Manifest.load(corpus)
    order = Order([Growth(0, Blocks.of(manifest.block_sizes()))], 11, 16)
    loader, costs = load(corpus, rows=1, window=32), manifest.entries(np.arange(90)).tokens
    for window in range(7):  # 224 samples: more than two epochs of 90
        spans: Counter[tuple[int, int]] = Counter()
        while loader.state.window == window:
            spans.update((s, at) for s, start, end in next(loader).spans for at in range(start, end))
        expected = order.samples(window * 32, window * 32 + 32).tolist()
        assert spans == Counter((s, at) for s in expected for at in range(costs[s]))


def test_every_worlds_ranks_build_the_same_step(corpus: Path) -> None:
    reference = steps(load(corpus, rows=24, micro=24, window=32), 5)
    for world, micro in ((1, 4), (2, 3), (3, 2), (4, 6), (8, 1), (6, 4)):
        ranks = [steps(load(corpus, rows=24, world=world, rank=r, micro=micro, window=32), 5) for r in range(world)]
        for number, whole in enumerate(reference):
            built = [ranks[r][number] for r in range(world)]
            parts = [m for a in range(24 // (world * micro)) for m in (b.micro_batches[a] for b in built)]
            assert torch.equal(torch.cat([p.input_ids_BT for p in parts]), whole.micro_batches[0].input_ids_BT)
            assert torch.equal(torch.cat([p.labels_BT for p in parts]), whole.micro_batches[0].labels_BT)
            assert [s for p in parts for row in p.spans for s in row] == whole.spans
            assert all(b.spans == whole.spans and b.state == whole.state for b in built)
            assert sum(b.local_tokens for b in built) == whole.local_tokens


SEGMENTS = st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8]), st.integers(0, 4)), min_size=1, max_size=5)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(segments=SEGMENTS, window=st.integers(1, 120), prefetch=st.sampled_from([0, 0, 2]), pack=st.booleans())
def test_resume_at_any_point_and_world(
    corpus: Path, segments: list[tuple[int, int]], window: int, prefetch: int, pack: bool
) -> None:
    """Killed after each segment, resumed at another world, twice and more: the stream of one unkilled run."""
    options: dict[str, Any] = {"rows": 840, "window": window, "pack": pack, "sequence_length": 3}
    state, seen, states = None, [], []
    for world, count in segments:
        rank = world - 1  # every rank plans the same spans; one of them stands for all
        with load(
            corpus, **options, world=world, rank=rank, micro=840 // world, state=state, prefetch=prefetch
        ) as loader:
            for batch in steps(loader, count):
                seen.append(batch.spans)
                states.append(batch.state)
            state = LoaderState.from_dict(json.loads(json.dumps(loader.state.to_dict())))
    unkilled = steps(load(corpus, **options, micro=840), len(seen))
    assert seen == [batch.spans for batch in unkilled]
    assert states == [batch.state for batch in unkilled]


def test_resumed_batches_hold_the_same_tokens(corpus: Path) -> None:
    whole = steps(load(corpus, rows=8, micro=4, window=32), 9)
    state = whole[4].state
    for rank in range(2):
        again = steps(load(corpus, rows=8, micro=4, window=32, world=2, rank=rank, state=state), 4)
        for old, new in zip(whole[5:], again, strict=True):
            assert torch.equal(new.micro_batches[0].input_ids_BT, old.micro_batches[rank].input_ids_BT)
            assert torch.equal(new.micro_batches[0].labels_BT, old.micro_batches[rank].labels_BT)


def test_resume_costs_the_same_anywhere(corpus: Path) -> None:
    """Resuming at window ten million reads and plans that window only."""
    start = load(corpus).state
    far = LoaderState(start.seed, start.stages, window=10**7)
    assert steps(load(corpus, state=far), 3)[-1].state.window >= 10**7


def test_state_refuses_another_stream_by_name(corpus: Path) -> None:
    state = next(load(corpus)).state
    with pytest.raises(UserError, match="seed was 11 and is now 12; window was 90 and is now 9; .*pack was"):
        load(corpus, seed=12, window=9, pack=False, state=state)
    saved = state.to_dict()
    with pytest.raises(UserError, match="version 99, this release reads 2"):
        LoaderState.from_dict(saved | {"version": 99})
    with pytest.raises(UserError, match="damaged"):
        LoaderState.from_dict({k: v for k, v in saved.items() if k != "stages"})


def test_another_manifest_is_refused(corpus: Path, corpora: Any, tmp_path: Path) -> None:
    other = corpora.prepare_documents(tmp_path, corpora.make_documents(40, seed=5))
    with pytest.raises(UserError, match="cannot resume the data stream: manifest .* was"):
        load(other, window=32, state=next(load(corpus, window=32)).state)


def test_jsonl_parquet_and_tokenised_give_the_same_batches(corpora: Any, tmp_path: Path) -> None:
    documents = corpora.make_documents(40)
    inputs = {
        "jsonl": corpora.write_jsonl(tmp_path / "a.jsonl", documents),
        "parquet": corpora.write_parquet(tmp_path / "a.parquet", documents, 100),
    }
    made = []
    for name, source in inputs.items():
        for tokenize in (False, True):
            out = str(tmp_path / f"{name}-{tokenize}")
            prepare(PrepareConfig(inputs=[str(source)], out=out, vocab_size=300, tokenize=tokenize))
            made.append(steps(load(Path(out), micro=6), 6))
    for other in made[1:]:
        for a, b in zip(made[0], other, strict=True):
            assert a.spans == b.spans
            assert torch.equal(a.micro_batches[0].input_ids_BT, b.micro_batches[0].input_ids_BT)
            assert torch.equal(a.micro_batches[0].labels_BT, b.micro_batches[0].labels_BT)


def test_without_token_counts_documents_are_concatenated(corpora: Any, tmp_path: Path) -> None:
    """The same rows as a counted manifest that is told not to pack."""
    documents = corpora.make_documents(40)
    counted = corpora.prepare_documents(tmp_path / "a", documents)
    plain = corpora.prepare_documents(tmp_path / "b", documents, count_tokens=False)
    assert Manifest.load(plain).tokens == 0
    ours = steps(load(plain, tokenizer=str(counted / "tokenizer"), micro=6), 8)
    theirs = steps(load(counted, pack=False, micro=6), 8)
    for a, b in zip(ours, theirs, strict=True):
        assert a.spans == b.spans
        assert torch.equal(a.micro_batches[0].input_ids_BT, b.micro_batches[0].input_ids_BT)


@pytest.mark.parametrize("documents", [["one"], [""], ["word " * 500], ["", "", ""]])
def test_tiny_corpora_stream_for_ever(corpora: Any, tmp_path: Path, documents: list[str]) -> None:
    corpus = corpora.prepare_documents(tmp_path, documents)
    manifest = Manifest.load(corpus)
    batches = steps(load(corpus, rows=4, micro=4), 30)
    assert all(batch.local_tokens > 0 for batch in batches)
    assert {s for b in batches for s, _, _ in b.spans} == set(range(len(documents)))
    assert batches[-1].state.window * manifest.tokens <= sum(b.local_tokens for b in batches)


def test_long_documents_are_cut_into_consecutive_spans(corpora: Any, tmp_path: Path) -> None:
    corpus = corpora.prepare_documents(tmp_path, ["word " * 500, "short"])
    cost = int(Manifest.load(corpus).entries(np.array([0])).tokens[0])
    assert cost > 3 * LENGTH
    spans = [s for b in steps(load(corpus, rows=1), 40) if b.state.window == 0 for s in b.spans if s[0] == 0]
    starts = list(range(0, cost, LENGTH))
    assert set(spans) <= {(0, start, min(start + LENGTH, cost)) for start in starts}


@pytest.mark.parametrize("prefetch", [0, 3])
def test_batch_that_ranks_do_not_divide(corpus: Path, prefetch: int) -> None:
    message = "batch of 12 rows cannot be dealt to 4 ranks in micro-batches of 2 rows; with these, 1, 2, 3, 6 ranks"
    with pytest.raises(UserError, match=message):
        load(corpus, rows=12, world=4, micro=2, prefetch=prefetch)
    with pytest.raises(UserError, match="make the batch a positive multiple of the micro-batch"):
        load(corpus, rows=13, micro=2)


def test_tokenizer_that_does_not_fit(corpus: Path, corpora: Any, tmp_path: Path) -> None:
    other = corpora.prepare_documents(tmp_path, corpora.make_documents(40), vocab_size=290)
    with pytest.raises(UserError, match="is not the one that .* was prepared with .* leave data.tokenizer unset"):
        load(corpus, tokenizer=str(other / "tokenizer"))
    plain = corpora.prepare_documents(tmp_path / "b", ["a"], count_tokens=False)
    with pytest.raises(UserError, match="no tokenizer lies beside .*; set data.tokenizer"):
        load(plain)


def break_shard(corpora: Any, tmp_path: Path, change: Callable[[Path], object]) -> Path:
    corpus: Path = corpora.prepare_documents(tmp_path, corpora.make_documents(40))
    change(tmp_path / "documents.jsonl")
    return corpus


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.write_text(p.read_text()[:-9]), "documents.jsonl is not the file that .*size .*restore it"),
        (lambda p: p.unlink(), "cannot read a shard .*documents.jsonl.*No such file.*put it back"),
    ],
)
def test_altered_shards_are_refused_by_name(
    corpora: Any, tmp_path: Path, prefetch: int, change: Callable[[Path], object], message: str
) -> None:
    loader = load(break_shard(corpora, tmp_path, change), prefetch=prefetch)
    with pytest.raises(UserError, match=message):
        next(loader)
    assert not loader_threads()


def test_a_flipped_bit_is_found_in_the_sample_that_it_changed(corpora: Any, tmp_path: Path) -> None:
    """Whatever the bit does to the line: it is not JSON, has no such field, or is another text."""
    documents = corpora.make_documents(40)
    corpus = corpora.prepare_documents(tmp_path, documents)
    path, whole = tmp_path / "documents.jsonl", steps(load(corpus, micro=6), 12)
    lines = path.read_bytes().splitlines(keepends=True)
    begin = sum(map(len, lines[:7]))
    for at in (begin, begin + 4, begin + 12, begin + len(lines[7]) - 4):
        raw = bytearray(b"".join(lines))
        raw[at] ^= 4
        path.write_bytes(raw)
        bad = steps(load(corpus, micro=6), 12)
        path.write_bytes(b"".join(lines))
        news = [entry for batch in bad for entry in batch.quarantined]
        assert 7 in {entry["sample"] for entry in news} <= {7, 8} and str(path) == news[0]["shard"]
        assert [batch.spans for batch in bad] == [batch.spans for batch in whole]


def spoil(monkeypatch: pytest.MonkeyPatch, bad: set[str]) -> None:
    """Make documents undecodable after preparation, as a failing disk or another library version would."""
    from millrace.data.sources.base import BadSample, Content
    from millrace.data.sources.jsonl import JsonlSource

    honest = JsonlSource._parse

    def parse(self: JsonlSource, line: bytes, offset: int) -> Content:
        record = honest(self, line, offset)
        return BadSample("spoilt") if isinstance(record, dict) and record["text"] in bad else record

    monkeypatch.setattr(JsonlSource, "_parse", parse)


def test_a_bad_sample_becomes_padding_and_the_plan_stays(
    corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = corpora.make_documents(40)
    corpus = corpora.prepare_documents(tmp_path, documents)
    good = steps(load(corpus, micro=6), 12)
    spoil(monkeypatch, {documents[7]})
    bad = steps(load(corpus, micro=6), 12)
    news = [entry for batch in bad for entry in batch.quarantined]
    assert news == [{"sample": 7, "shard": str(tmp_path / "documents.jsonl"), "why": "spoilt"}]
    for a, b in zip(good, bad, strict=True):
        assert a.spans == b.spans and a.state == b.state
        lost = sum(end - start for sample, start, end in a.spans if sample == 7)
        assert b.local_tokens == a.local_tokens - lost and (b.local_bytes < a.local_bytes if lost else True)
        masked = (a.micro_batches[0].labels_BT != b.micro_batches[0].labels_BT).sum()
        assert int(masked) == lost and (b.micro_batches[0].seq_lens == a.micro_batches[0].seq_lens)


def test_the_step_that_holds_a_bad_sample_tells_of_it(
    corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the steps of a window are built together."""
    documents = corpora.make_documents(60)
    corpus = corpora.prepare_documents(tmp_path, documents)
    spoil(monkeypatch, set(documents[::9]))
    seen: set[int] = set()
    for batch in steps(load(corpus, rows=2), 60):
        samples = {sample for sample, _, _ in batch.spans}
        told = {entry["sample"] for entry in batch.quarantined}
        assert told == samples & set(range(0, 60, 9)) - seen
        seen |= told
    assert len(seen) == 7


def test_an_excluded_sample_stays_out_although_it_can_be_read_again(
    corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = corpora.make_documents(40)
    corpus = corpora.prepare_documents(tmp_path, documents)
    with monkeypatch.context() as spoilt:
        spoil(spoilt, {documents[7]})
        bad = steps(load(corpus, micro=6), 12)
    again = load(corpus, micro=6)
    again.exclude({7: "spoilt"})
    for a, b in zip(bad, steps(again, 12), strict=True):
        assert a.spans == b.spans and a.local_tokens == b.local_tokens and not b.quarantined
        assert torch.equal(a.micro_batches[0].labels_BT, b.micro_batches[0].labels_BT)


def test_excluded_samples_count_against_the_budget(corpus: Path) -> None:
    loader = load(corpus, max_bad_samples=2)
    loader.exclude({3: "spoilt", 4: "spoilt"})
    with pytest.raises(UserError, match="3 samples could not be used, .*last: sample 9 of .*: gone"):
        loader.exclude({9: "gone"})


@pytest.mark.parametrize("prefetch", [0, 2])
def test_too_many_bad_samples_stop_the_run(
    corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefetch: int
) -> None:
    documents = corpora.make_documents(40)
    corpus = corpora.prepare_documents(tmp_path, documents)
    spoil(monkeypatch, set(documents[3:9]))
    loader = load(corpus, max_bad_samples=2, prefetch=prefetch)
    with pytest.raises(UserError, match="3 samples could not be used, more than data.max_bad_samples = 2 .*spoilt"):
        steps(loader, 100)


def test_a_document_with_another_number_of_tokens_is_quarantined(
    corpora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = corpora.prepare_documents(tmp_path, corpora.make_documents(40))
    honest = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode_words", lambda self, texts: [ids[:5] for ids in honest(self, texts)])
    with pytest.raises(UserError, match="costs 6 positions, the manifest says"):
        steps(load(corpus), 30)


def test_prefetching_changes_nothing_and_ends_when_closed(corpus: Path) -> None:
    plain = steps(load(corpus, micro=6), 8)
    loader = load(corpus, micro=6, prefetch=3)
    ahead = steps(loader, 8)
    assert loader.state == ahead[-1].state
    loader.close()
    assert not loader_threads()
    assert list(loader) == []
    for a, b in zip(plain, ahead, strict=True):
        assert a.spans == b.spans and a.state == b.state
        assert torch.equal(a.micro_batches[0].input_ids_BT, b.micro_batches[0].input_ids_BT)


def test_rows_of_a_window_come_in_a_mixed_order_of_the_seed(corpus: Path) -> None:
    """Best-fit-decreasing alone would begin with the longest spans."""

    def first_lengths(seed: int) -> list[int]:
        rows = [b.spans[0] for b in steps(load(corpus, rows=1, window=90, seed=seed), 40)]
        return [end - start for _, start, end in rows]

    lengths = first_lengths(1)
    assert lengths != sorted(lengths, reverse=True)
    assert lengths != first_lengths(2)


def test_memory_of_documents_is_released(corpus: Path) -> None:
    loader = load(corpus, window=8, prefetch=0)
    held = []
    for _ in range(60):
        assert next(loader).local_tokens
        held.append(len(loader._maker._builder.documents._shelves))
    assert set(held) == {0, 1}  # the rest of a window


@pytest.mark.parametrize("pack", [True, False])
def test_bytes_are_those_of_the_documents(corpora: Any, tmp_path: Path, pack: bool) -> None:
    """Of each span its share of the document's, whoever builds it: the shares of a document sum to it exactly."""
    documents = corpora.make_documents(40, longest=3 * LENGTH)
    corpus = corpora.prepare_documents(tmp_path, documents)
    tokenizer = load_tokenizer(corpus / "tokenizer")
    costs = [len(bordered(tokenizer, document)) - 1 for document in documents]
    sizes = [len(document.encode()) for document in documents]
    ranks = [steps(load(corpus, window=20, rows=4, world=2, rank=rank, pack=pack), 30) for rank in range(2)]
    for parts in zip(*ranks, strict=True):
        spans = parts[0].spans
        shares = [sizes[s] * end // costs[s] - sizes[s] * start // costs[s] for s, start, end in spans]
        assert sum(part.local_bytes for part in parts) == sum(shares)


def test_spans_sha() -> None:
    import hashlib

    spans = [(3, 0, 7), (2**40, 5, 6)]
    assert spans_sha(spans) == hashlib.sha256(np.array(spans, "<i8").tobytes()).hexdigest()
    assert spans_sha(spans) != spans_sha(spans[::-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, "sequence_length = 1 must be at least 2"),
        ({"window": 0}, "window = 0"),
        ({"prefetch": -1}, "prefetch = -1"),
        ({"max_bad_samples": -1}, "max_bad_samples = -1"),
    ],
)
def test_options_are_checked(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [1, 2])
def test_steps_that_are_built_together_are_those_built_alone(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    together = [steps(load(corpus, window=40, rows=4, world=world, rank=world - 1), 60)]
    monkeypatch.setattr("millrace.data.builder._TOGETHER", 0)
    together.append(steps(load(corpus, window=40, rows=4, world=world, rank=world - 1), 60))
    for a, b in zip(*together, strict=True):
        assert a.spans == b.spans and a.state == b.state
        assert (a.local_tokens, a.local_bytes) == (b.local_tokens, b.local_bytes)
        for ours, theirs in zip(a.micro_batches, b.micro_batches, strict=True):
            assert ours.spans == theirs.spans and ours.seq_lens == theirs.seq_lens
            for name in ("input_ids_BT", "labels_BT", "position_ids_BT"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_no_step_waits_for_a_later_window(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps that lie in a window come before anything of the next is asked for."""
    taken: list[int] = []
    take = Documents.take

    def spy(documents: Documents, window: int, samples: np.ndarray, costs: np.ndarray | None) -> Any:
        taken.append(window)
        return take(documents, window, samples, costs)

    monkeypatch.setattr(Documents, "take", spy)
    for batch in itertools.islice(load(corpus, window=16, rows=2), 40):
        assert max(taken) <= batch.state.window
    assert len(taken) < 30 and max(taken) > 2
