from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from millrace.core.errors import UserError
from millrace.data.batch import IGNORED
from millrace.data.config import DataConfig
from millrace.data.loader import heldout_batches
from millrace.data.manifest import Manifest


@pytest.fixture(scope="module")
def split(corpora: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    made: Path = corpora.prepare_documents(folder, corpora.make_documents(200), heldout=0.3)
    return made


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("window", [16, 10**6])
def test_one_pass_covers_every_target_and_byte_once(split: Path, world: int, window: int) -> None:
    config = DataConfig(manifest=str(split), sequence_length=48, window=window)
    manifest = Manifest.load(split / "heldout")
    ranks = [list(heldout_batches(config, 2, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen: Counter[tuple[int, int]] = Counter()
    targets = size = 0
    for batches in ranks:
        for batch, covered in batches:
            assert batch.input_ids_BT.shape == (2, 48)
            seen.update((s, at) for row in batch.spans for s, a, b in row for at in range(a, b))
            targets += int((batch.labels_BT != IGNORED).sum())
            size += covered
    assert set(seen.values()) == {1} and seen.total() == targets == manifest.tokens
    assert size == manifest.bytes


def test_rows_can_be_bounded(split: Path) -> None:
    config = DataConfig(manifest=str(split), sequence_length=48)
    for world in (1, 2):
        assert len(list(heldout_batches(config, 2, 0, world, max_rows=8))) == 8 // 2 // world
    everything = list(heldout_batches(config, 2, 0, 1))
    assert len(list(heldout_batches(config, 2, 0, 1, max_rows=10**9))) == len(everything) > 4


def test_a_bounded_pass_is_a_sample_of_the_whole_text_and_of_no_world(split: Path) -> None:
    config = DataConfig(manifest=str(split), sequence_length=48)
    count = Manifest.load(split / "heldout").samples

    def spans(world: int) -> list[tuple[int, int, int]]:
        ranks = [heldout_batches(config, 2, rank, world, max_rows=12) for rank in range(world)]
        return sorted(tuple(span) for batches in ranks for b, _ in batches for row in b.spans for span in row)

    assert spans(1) == spans(2) == spans(3)
    thirds = {3 * sample // count for sample, _, _ in spans(1)}
    assert thirds == {0, 1, 2}


def test_another_manifest_can_be_held_out(split: Path, corpora: Any, tmp_path: Path) -> None:
    other = corpora.prepare_documents(tmp_path / "a", ["some text"], tokenizer=str(split / "tokenizer"))
    config = DataConfig(manifest=str(split), heldout=str(other))
    ((_, size),) = heldout_batches(config, 1, 0, 1)
    assert size == 9
    misfit = corpora.prepare_documents(tmp_path / "b", ["some text"])
    with pytest.raises(UserError, match="is not the one that .* was prepared with"):
        next(
            heldout_batches(
                DataConfig(manifest=str(split), heldout=str(misfit), tokenizer=str(split / "tokenizer")),
                1,
                0,
                1,
            )
        )


def test_no_held_out_part(corpus: Path) -> None:
    with pytest.raises(UserError, match="has no held-out part; set data.heldout, or prepare with heldout=0.05"):
        next(heldout_batches(DataConfig(manifest=str(corpus)), 1, 0, 1))
