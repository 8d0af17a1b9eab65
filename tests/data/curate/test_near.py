"""Near duplicates against exact Jaccard similarities of the sets of 5-grams."""

from __future__ import annotations

import io
import random
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.data.curate import near
from millrace.data.curate.words import near_words, ngram_hashes


def _grams(text: str) -> set[tuple[str, ...]]:
    words = near_words(text)
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


def _jaccard(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    return len(one & other) / len(one | other)


def _families(made: SimpleNamespace, count: int) -> list[str]:
    """`count` texts, each followed by five copies with 1 to 40 words changed, and by one cut in half."""
    draw, texts = random.Random(7), []
    for family in range(count):
        words = made.prose(family, 200).split()
        texts.append(" ".join(words))
        for changes in (1, 2, 4, 10, 40):
            copy = list(words)
            for at in draw.sample(range(len(copy)), changes):
                copy[at] = draw.choice(made.vocabulary)
            texts.append(" ".join(copy))
        texts.append(" ".join(words[: draw.randrange(90, 110)]))
    return texts


def test_pairs_are_found_by_their_similarity(tmp_path: Path, made: SimpleNamespace) -> None:
    """J >= 0.9: 99% are found; J <= 0.5: none is joined directly; between, as often as the curve says."""
    texts = _families(made, 100)
    made.write(tmp_path / "in.jsonl", texts)
    links = _links(tmp_path, texts)
    grams = [_grams(text) for text in texts]
    pairs = {
        (one, other): _jaccard(grams[one], grams[other])
        for start in range(0, len(texts), 7)
        for one, other in combinations(range(start, start + 7), 2)
    }
    assert all(_jaccard(grams[one], grams[other]) > 0.5 for one, other in links)
    duplicates, kept = near.clusters(np.array(sorted(links)).reshape(-1, 2))
    first = dict(zip(duplicates.tolist(), kept.tolist(), strict=True))
    alike = [pair for pair, similarity in pairs.items() if similarity >= 0.9]
    joined = [first.get(one, one) == first.get(other, other) for one, other in alike]
    assert len(alike) > 200 and np.mean(joined) >= 0.99
    assert sum(similarity <= 0.5 for similarity in pairs.values()) > 400


def _links(folder: Path, texts: list[str]) -> set[tuple[int, int]]:
    """Pairs that are joined directly, over all bands; texts in two units of unequal size."""
    from datatrove.data import Document

    (folder / "rows").mkdir()
    (folder / "pairs").mkdir()
    cut = 333
    for unit, part in enumerate((texts[:cut], texts[cut:])):
        with open(folder / "rows" / f"{unit:05d}", "wb") as rows:
            stream = (Document(text=text, id="") for text in part)
            near.Signatures(folder / "signatures", rows).run(stream, unit)
    bands = [near.band_pairs(b, folder / "signatures", folder / "rows", folder / "pairs") for b in range(near.BANDS)]
    starts = np.array([0, cut])
    return {(int(starts[a] + b), int(starts[c] + d)) for band in bands for a, b, c, d in band.tolist()}


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.7, 0.75, 0.8, 0.9])
def test_the_curve_against_a_simulation(similarity: float) -> None:
    agree = np.random.default_rng(0).random((40_000, near.BANDS, near.BAND_HASHES)) < similarity
    found = agree.all(2).any(1) & (agree.sum((1, 2)) >= near.AGREE)
    assert near.found_probability(similarity) == pytest.approx(found.mean(), abs=4 * 0.5 / 200)


def test_signatures_are_datatroves(tmp_path: Path, made: SimpleNamespace) -> None:
    """In pieces as in one go; and a text that is too short has none, so that it is nobody's duplicate."""
    rows = io.BytesIO()
    ours = near.Signatures(tmp_path, rows)
    theirs = MinhashDedupSignature(str(tmp_path), near._CONFIG, language=near.WORDS)
    shingles = ours.get_shingles(made.prose(0, 10_000))
    assert shingles.shape == (9996, 1) and len(shingles) > 2 * near._PIECE
    assert ours.get_signature(shingles) == theirs.get_signature(shingles)
    assert len(ours.get_shingles("four words are few")) == 0
    stored = np.frombuffer(rows.getvalue(), np.uint64).reshape(-1, near.HASHES)
    assert stored[0].tolist() == [h for band in theirs.get_signature(shingles) for h in band]
    assert not stored[1].any()


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=6), st.integers(1, 5))
def test_hashes_are_equal_where_ngrams_are(texts: list[list[int]], n: int) -> None:
    seen: dict[int, tuple[str, ...]] = {}
    for text in texts:
        words = [str(word) for word in text]
        hashes = ngram_hashes(words, n)
        assert len(hashes) == max(0, len(words) - n + 1)
        for at, value in enumerate(hashes.tolist()):
            assert seen.setdefault(value, tuple(words[at : at + n])) == tuple(words[at : at + n])
    assert len(set(seen.values())) == len(seen)


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)).filter(lambda p: p[0] != p[1]), max_size=20))
def test_clusters_are_connected_components(links: list[tuple[int, int]]) -> None:
    """Against the closure by repeated scanning."""
    first = {document: document for pair in links for document in pair}
    for _ in range(len(links) + 1):
        for one, other in links:
            first[one] = first[other] = min(first[one], first[other])
    expected = sorted((document, kept) for document, kept in first.items() if document != kept)
    duplicates, kept = near.clusters(np.array(links, np.int64).reshape(-1, 2))
    assert list(zip(duplicates.tolist(), kept.tolist(), strict=True)) == expected


def test_the_first_of_a_cluster_stays(tmp_path: Path, made: SimpleNamespace) -> None:
    """Across inputs; and what quality removed does not stand for others."""
    from millrace.data.curate.curate import curate

    text = made.prose(0, 200)
    copies = [text.replace(word, word[::-1], 1) for word in text.split()[50:150:50]]
    junk = text.replace(".", "...")  # removed by the rule of lines that end in an ellipsis; the same words
    inputs = [
        made.write(tmp_path / name, texts)
        for name, texts in (("a.jsonl", [junk, copies[0]]), ("b.jsonl", [text, copies[1]]))
    ]
    report = curate(made.config(tmp_path, inputs)).report
    removed = {row["id"].rpartition("/")[2]: row for row in made.rows(tmp_path / "out", "removed")}
    assert {name: (row["step"], row["kept"].rpartition("/")[2]) for name, row in removed.items()} == {
        "a.jsonl#0": ("quality", ""),
        "b.jsonl#0": ("near", "a.jsonl#1"),
        "b.jsonl#1": ("near", "a.jsonl#1"),
    }
    row = removed["b.jsonl#0"]
    assert row["value"] == pytest.approx(_jaccard(_grams(text), _grams(copies[0])), abs=0.12)
    assert row["detail"] == f"{round(row['value'] * 112)} of 112 hashes agree"
    assert report["near"]["clusters"] == 1 and report["near"]["largest"] == 3
