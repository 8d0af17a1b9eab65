"""Exported folders against the model that was trained, and against `from_pretrained`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from millrace.core.errors import UserError
from millrace.engine import export as module
from millrace.engine.export import export
from millrace.models.bridge import build_model
from millrace.models.config import ModelConfig
from tests.handmade import alter, small_model, small_tokenizer, write_checkpoint
from tests.pretrain.samples_worker import objective_of, samples
from tests.ranks import ROOT, environment, run_world

IDS = torch.arange(100).reshape(2, 50) * 7 % 300

LLAMA = (  # naming a kind clears what the file says of the model
    "model.config={hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, "
    "tie_word_embeddings=true}"
)
SHARDED = {
    "qwen3": ["engine.zero_stage=2"],
    "llama": ["model.kind=llama", LLAMA, "engine.zero_stage=3", "engine.persistence_threshold=0"],
    "gpt2": ["model.kind=gpt2", "model.config={n_embd=32, n_layer=2, n_head=2}", "engine.zero_stage=1"],  # tied
    "recurrent_gemma": [
        "model.kind=recurrent_gemma", "engine.zero_stage=3",
        "model.config={hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2}",
    ],
    "mamba2": [
        "model.kind=mamba2", "engine.zero_stage=2",
        "model.config={hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=16, n_groups=1}",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step of each kind on two ranks, saved, with the logits of the model in training."""
    folder = tmp_path_factory.mktemp("trained")
    scenarios = [{"overrides": how, "out": str(folder / kind)} for kind, how in SHARDED.items()]
    job = folder / "job.json"
    job.write_text(json.dumps({"config": str(config_file), "scenarios": scenarios}))
    run_world(Path(__file__).with_name("export_worker.py"), 2, [str(job)])
    return folder


@pytest.mark.parametrize("kind", SHARDED)
def test_logits_equal_those_in_training_on_two_ranks(kind: str, trained: Path, tmp_path: Path) -> None:
    kept = load_file(trained / kind / "logits.safetensors")
    summary = export(trained / kind, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    difference = (model.eval()(input_ids=kept["ids"]).logits - kept["logits"]).abs().max()
    print(f"{kind}: largest difference of logits {difference:.1e} of {kept['logits'].abs().max():.1f}")
    assert difference <= 1e-5
    assert summary.source["step"] == 1 and summary.source["manifests"]
    assert summary.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", SHARDED)
def test_starts_a_run_again(kind: str, trained: Path, tmp_path: Path) -> None:
    export(trained / kind, tmp_path / "out")
    again = build_model(ModelConfig(init=str(tmp_path / "out")), 320, 64, 0)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.state_dict().keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"tie_word_embeddings": True}),
    ("llama", {}),
    ("gpt2", {}),
    ("mixtral", {"num_local_experts": 4, "num_key_value_heads": 2}),
    ("nanochat", {}),
    ("olmo2", {}),
]


@pytest.mark.parametrize(("kind", "table"), FAMILIES)
def test_families_in_several_files(kind: str, table: dict[str, Any], tmp_path: Path) -> None:
    """Every tensor differs from its first value, so a lost one shows; experts are split again."""
    model = small_model(kind, **table)
    write_checkpoint(tmp_path / "run" / "checkpoints", model, world=3)
    export(tmp_path / "run", tmp_path / "out", max_shard=60_000)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=60_000)
    index, theirs = (json.loads((tmp_path / f / "model.safetensors.index.json").read_text()) for f in ("out", "theirs"))
    assert index["weight_map"].keys() == theirs["weight_map"].keys()
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    left, right = (m(input_ids=IDS, use_cache=False).logits for m in (model, loaded))
    assert (left - right).abs().max() <= 1e-5


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = small_model("gpt2")
    export(write_checkpoint(tmp_path, model), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names


def test_frozen_parameters_and_buffers_travel(tmp_path: Path) -> None:
    model = small_model("qwen3")
    model.model.layers[0].mlp.requires_grad_(False)
    model.model.register_buffer("statistics", torch.arange(4.0))
    path = write_checkpoint(tmp_path, model)
    with pytest.raises(UserError, match="model.statistics is .4. in the weights and None in the model"):
        export(path, tmp_path / "out")
    del model.model.statistics
    export(write_checkpoint(tmp_path / "again", model), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_bf16(tmp_path: Path) -> None:
    model = small_model("qwen3")
    summary = export(write_checkpoint(tmp_path, model), tmp_path / "out", "bf16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and summary.bytes == 2 * summary.parameters
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.bfloat16(), loaded.state_dict()[name]), name


def test_configuration_makes_sense_to_others(tmp_path: Path) -> None:
    export(write_checkpoint(tmp_path, small_model("qwen3")), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["dtype"] == "float32" and config["use_cache"] is True
    assert config["bos_token_id"] == config["eos_token_id"] == small_tokenizer().eos_id
    assert config["pad_token_id"] is None  # eos as padding would freeze its embedding in whoever trains on
    assert not any("attn" in key or "auto_map" in key for key in config)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "The miller counts."
    assert tokenizer(text).input_ids == small_tokenizer().encode([text])[0].tolist()
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generate(torch.tensor([[0, 5]]), max_new_tokens=3, do_sample=False).shape[1] <= 5
    assert not list((tmp_path / "out").glob("*.py"))


def module_of(kind: str, **config: Any) -> Any:
    """What an objective trains, every weight of it moved; beside the model it holds more."""
    sections: dict[str, Any] = {"objective": {"kind": kind}, "model": {"config": config}}
    sections["model"]["kind"] = "generator" if kind == "gan" else kind
    module = objective_of(sections).modules["model"]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return module.eval()


SIZES = {"widths": [8, 16], "strides": [2, 2]}
CODECS: list[dict[str, Any]] = [
    {"latent": 4, "codes": 16},
    {"bottleneck": "fsq", "levels": [5, 4, 3]},
    {"modality": "audio", "mel": {"rate": 8000, "window": 64, "hop": 16, "bands": 16}, "codes": 16},
]


@pytest.mark.parametrize("config", CODECS)
def test_codecs(config: dict[str, Any], tmp_path: Path) -> None:
    module = module_of("codec", **SIZES, **config)
    views = '{role = "image", name = "seen", size = 16}, {role = "audio", rate = 8000, seconds = 0.05, gain = 3.0}'
    path = write_checkpoint(tmp_path, module, settings=f'views = [{views}]\n[objective]\nview = ""\n')
    files = export(path, tmp_path / "out").files
    assert {"config.json", "model.safetensors"} < set(files) and "generation_config.json" not in files
    loaded, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    values = samples(0, 0, 4).values[module.model.config.modality]
    ours, theirs = module.model(values), loaded.eval()(values)
    assert torch.equal(ours.made, theirs.made) and torch.equal(module.model.encode(values), loaded.encode(values))
    sound = config.get("modality") == "audio"
    assert (tmp_path / "out" / "view.json").is_file() == sound, "the image's view has another name than is asked for"
    if sound:
        view = {"role": "audio", "rate": 8000, "seconds": 0.05}
        assert json.loads((tmp_path / "out" / "view.json").read_text()) == view


def test_of_a_generator_the_running_mean(tmp_path: Path) -> None:
    module = module_of("gan", **SIZES, grid=4, noise=8)
    export(write_checkpoint(tmp_path, module), tmp_path / "out")
    loaded = AutoModel.from_pretrained(tmp_path / "out").eval()
    noise = torch.randn(3, 8)
    assert torch.equal(loaded(noise), module(noise)) and not torch.equal(loaded(noise), module.maker(noise))


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, small_model("qwen3"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="out is not empty and is no earlier export; give another folder"):
        export(path, out)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file"):
        export(path, out / "thesis.txt")


def test_earlier_export_is_replaced(tmp_path: Path) -> None:
    export(write_checkpoint(tmp_path / "a", small_model("gpt2")), tmp_path / "out", max_shard=50_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    export(write_checkpoint(tmp_path / "b", small_model("qwen3")), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert not list(tmp_path.glob(".out*"))


def test_full_disk_leaves_the_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path, small_model("qwen3"))
    export(path, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(UserError, match="No space left on device; free space"):
        export(path, tmp_path / "out", "bf16")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("file", ["rank-00001.safetensors", "model/config.json", "tokenizer/tokenizer.json"])
def test_altered_checkpoint_is_refused(file: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, small_model("qwen3"))
    alter(path / file)
    with pytest.raises(UserError, match=f"{file} was altered"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_torn_newest_falls_back_to_the_good_one(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    write_checkpoint(folder, small_model("qwen3", seed=1), step=1)
    newest = write_checkpoint(folder, small_model("qwen3", seed=2), step=2)
    file = newest / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert export(tmp_path / "run", tmp_path / "out").source["step"] == 1


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, small_model("qwen3"))
    other = small_model("qwen3", intermediate_size=64)
    again = write_checkpoint(tmp_path / "b", other)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    swapped = json.loads((again / "MANIFEST.json").read_text())
    (path / "model" / "config.json").write_bytes((again / "model" / "config.json").read_bytes())
    manifest["files"]["model/config.json"] = swapped["files"]["model/config.json"]
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match=r"do not belong together: model\.layers\.0\.mlp.* is \[.*48.*\] in the weights"
    ):
        export(path, tmp_path / "out")


MEMORY = """
import re, sys, threading
from millrace.engine.export import export

def resident():
    with open("/proc/self/status") as file:  # anonymous memory: mapped files are the disk cache's
        return int(re.search(r"RssAnon:\\s+(\\d+)", file.read())[1]) * 1024

def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], resident())

small, big, out = sys.argv[1:]
export(small, out + "-small", "bf16")
base, peak, done = resident(), [0], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
export(big, out + "-big", "bf16")
done.set()
thread.join()
print("PEAK", peak[0] - base)
"""


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """About 200 MB of weights, 4 MB the largest tensor: a process that held all of them would grow by 200 MB."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 12}
    big = build_model(ModelConfig(kind="llama", config=sizes), 300, 64, 0)
    total = sum(p.numel() * 4 for p in big.parameters())
    largest = max(p.numel() * 4 for p in big.parameters())
    paths = [write_checkpoint(tmp_path / "small", small_model("llama")), write_checkpoint(tmp_path / "big", big)]
    command = [sys.executable, "-c", MEMORY, *map(str, paths), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("PEAK")[1])
    print(f"model {total / 1e6:.0f} MB, largest tensor {largest / 1e6:.1f} MB, growth {peak / 1e6:.1f} MB")
    assert total > 190e6 and largest < 5e6
    assert peak < 4 * largest + 40e6  # a few copies of the largest, and two of the 16 MiB blocks that are hashed
