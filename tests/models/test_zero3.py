"""Equal initial weights at stages 0 and 3 and worlds 1 and 3, without any rank ever holding the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from millrace.models.bridge import build_model
from millrace.models.config import ModelConfig
from tests.ranks import run_world

SCRIPT = Path(__file__).with_name("zero3_weights.py")


def digest(model: torch.nn.Module) -> str:
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        sha.update(name.encode() + parameter.detach().float().numpy().tobytes())
    for name, buffer in model.named_buffers():
        sha.update(f"{name} {buffer.dtype}".encode() + buffer.float().numpy().tobytes())
    return sha.hexdigest()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("saved")
    for name, kind in (("dense", "qwen3"), ("mixture", "mixtral"), ("broken", "qwen3")):
        build_model(ModelConfig(kind=kind, depth=1), 500, 64, 3).save_pretrained(root / name)
    file = root / "broken" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    return {name: str(root / name) for name in ("dense", "mixture", "broken")}


@pytest.fixture(scope="module", params=[1, 3])  # three ranks pad their parts
def stage3(request: pytest.FixtureRequest, folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("out") / "result.json"
    run_world(SCRIPT, request.param, [str(out), *folders.values()])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def stage0(folders: dict[str, str]) -> dict[str, str]:
    low = build_model(ModelConfig(depth=2), 500, 64, 7)
    for parameter in low.parameters():  # an engine casts parameters; buffers are compared in their own dtype
        parameter.data = parameter.data.bfloat16()
    tied = ModelConfig(kind="gpt2", depth=2, config={"tie_word_embeddings": True})
    return {
        "qwen3": digest(build_model(ModelConfig(depth=2), 500, 64, 7)),
        "qwen3 bf16": digest(low),
        "gpt2 tied": digest(build_model(tied, 500, 64, 7)),
        "mixtral": digest(build_model(ModelConfig(kind="mixtral", depth=1), 500, 64, 7)),
        "from folder": digest(build_model(ModelConfig(init=folders["dense"]), 500, 64, 7)),
        "from mixture": digest(build_model(ModelConfig(init=folders["mixture"]), 500, 64, 7)),
    }


def test_weights_and_buffers_equal_those_of_stage_0(stage3: dict, stage0: dict[str, str]) -> None:
    assert {name: stage3[name] for name in stage0} == stage0
    assert len(set(stage0.values())) == len(stage0)


def test_no_rank_holds_the_model(stage3: dict) -> None:
    peak, total = stage3["peak"]["numel"], stage3["peak"]["total"]
    assert stage3["largest"] <= peak < total / 4, stage3["peak"]


def test_all_ranks_refuse_a_broken_folder_by_name(stage3: dict) -> None:
    assert "missing tensors: model.norm.weight" in stage3["refused"]
