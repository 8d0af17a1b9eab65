"""`millrace checkpoint import`: the only place where anything is unpickled, and only when asked to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from millrace.core.errors import UserError
from millrace.launch.import_weights import main


class Runs:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def weights() -> dict[str, torch.Tensor]:
    shared = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    return {"embed.weight": shared, "head.weight": shared, "norm.weight": torch.ones(3, dtype=torch.bfloat16)}


@pytest.mark.parametrize("inside", ["", "state_dict", "model"])
def test_weights_arrive_as_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str], inside: str) -> None:
    file = tmp_path / "model.pt"
    torch.save({inside: weights(), "step": 3} if inside else weights(), file)
    assert main([str(file), str(tmp_path / "out"), "--trust-pickle"]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == weights().keys() and all(torch.equal(found[k], v) for k, v in weights().items())
    said = " ".join(capsys.readouterr().err.split())
    assert f"unpickling {file} (SHA-256 " in said


def test_a_folder_keeps_its_configuration(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    source.mkdir()
    torch.save({"a": torch.ones(2)}, source / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(2)}, source / "pytorch_model-00002-of-00002.bin")
    (source / "config.json").write_text('{"model_type": "llama"}')
    (source / "pytorch_model.bin.index.json").write_text("{}")
    assert main([str(source), str(tmp_path / "out"), "--trust-pickle"]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "llama"}
    assert sorted(load_file(tmp_path / "out" / "model.safetensors")) == ["a", "b"]


def test_without_trust_nothing_is_read(tmp_path: Path) -> None:
    torch.save({"a": Runs(tmp_path / "ran")}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model.pt is a pickle: .*--trust-pickle"):
        main([str(tmp_path / "model.pt"), str(tmp_path / "out")])
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, says",
    [([1, 2], "holds a list, not weights"), ({"epoch": 3}, "holds no tensor by name; its keys are epoch")],
)
def test_what_is_not_weights(tmp_path: Path, content: Any, says: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=says):
        main([str(tmp_path / "model.pt"), str(tmp_path / "out"), "--trust-pickle"])
    assert not (tmp_path / "out").exists()


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        main([str(tmp_path / "nowhere.pt"), str(tmp_path / "out"), "--trust-pickle"])
    torch.save(weights(), tmp_path / "model.pt")
    with pytest.raises(UserError, match="is there already"):
        main([str(tmp_path / "model.pt"), str(tmp_path), "--trust-pickle"])
