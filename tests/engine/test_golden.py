"""Checkpoints that released versions wrote: verified, read and evaluated as they were then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from millrace.core.errors import UserError
from millrace.data.state import LoaderState
from millrace.engine.checkpoint.read import Checkpoint, list_checkpoints, verdict
from millrace.eval.subject import open_subject

FOLDERS = sorted(Path(__file__).parents[1].glob("golden/checkpoint-*"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def golden(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_there_is_one_of_the_first_version() -> None:
    assert FOLDERS[0].name == "checkpoint-0.1.0"


def test_it_is_read_and_evaluated_as_it_was(golden: Path) -> None:
    expected = json.loads((golden / "expected.json").read_text())
    (path,) = list_checkpoints(golden)
    assert not verdict(path)
    checkpoint = Checkpoint(path)
    assert checkpoint.step == expected["step"] and checkpoint.digest() == expected["digest"]
    model = open_subject(path, dtype="fp32").model
    ids_BT = torch.arange(48).reshape(2, 24) * 7 % 280
    with torch.no_grad():
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    assert logits_BTV[:, -1, :5].flatten().tolist() == pytest.approx(expected["logits"], abs=1e-5)


def test_a_file_outside_of_it_is_not_opened(golden: Path, tmp_path: Path) -> None:
    (source,) = list_checkpoints(golden)
    path = Path(shutil.copytree(source, tmp_path / source.name))
    for rank in sorted(path.glob("rank-*.json")):
        (tmp_path / f"{rank.stem}.safetensors").write_bytes((path / f"{rank.stem}.safetensors").read_bytes())
        rank.write_text(rank.read_text().replace('"rank-', '"../rank-'))
    with pytest.raises(UserError, match="names '../rank-.*, which its manifest does not list"):
        Checkpoint(path).digest()


def test_the_stream_of_the_first_version_cannot_be_continued_and_says_so() -> None:
    (path,) = list_checkpoints(FOLDERS[0])
    with pytest.raises(UserError, match="resume with the release that wrote the checkpoint"):
        LoaderState.from_dict(Checkpoint(path).json("trainer")["loader"])
