"""A rank's slices in files of bounded size: everything once, and read back as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.engine.checkpoint import write
from millrace.engine.checkpoint.read import Checkpoint, verdict
from millrace.engine.checkpoint.write import Content, Slice, commit, write_rank


def slices(sizes: list[int]) -> list[Slice]:
    return [Slice(f"model|p{n}|master", 0, torch.arange(size, dtype=torch.float32)) for n, size in enumerate(sizes)]


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(1, 40))
def test_every_element_is_in_one_file_and_no_file_is_too_large(sizes: list[int], elements: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "FILE_BYTES", 4 * elements)
        files = list(write._files(slices(sizes)))
    assert all(sum(piece.values.numel() for piece in file) <= elements for file in files)
    assert len(files) == max(1, math.ceil(sum(sizes) / elements)), "no file but the last has room left"
    for number, size in enumerate(sizes):
        pieces = [piece for file in files for piece in file if piece.key == f"model|p{number}|master"]
        assert [p.start for p in pieces] == [int(p.values[0]) for p in pieces]
        assert torch.equal(torch.cat([p.values for p in pieces]), torch.arange(size, dtype=torch.float32))


def test_a_parameter_cut_into_files_is_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "FILE_BYTES", 64)  # 16 elements
    facts = {"format": write.FORMAT, "step": 1, "world": 1, "states": ["master"], "params": {"p0": [10], "p1": [5, 9]}}
    content = Content(0, slices([10, 45]), {}, {"trainer": {}}, facts)
    write_rank(tmp_path / "tmp", content)
    commit(tmp_path / "tmp", tmp_path / "step-00000001", content, None)
    found = Checkpoint(tmp_path / "step-00000001")
    assert not verdict(found.path) and len(list(found.path.glob("rank-00000*.safetensors"))) == 4
    assert torch.equal(found.master("p1"), torch.arange(45, dtype=torch.float32).reshape(5, 9))
    assert torch.equal(found.read("p1", "master", 3, 20), torch.arange(3, 23, dtype=torch.float32))
    entry = json.loads((found.path / "rank-00000.json").read_text())
    assert sum(length for file in entry["files"] for _, length in file["slices"].values()) == 55
