"""Whole runs: one process for all runs on one rank, one launch for those on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

from millrace.core.ledger import read
from millrace.engine.checkpoint.read import Checkpoint, list_checkpoints
from millrace.finetune.classify import register_classifier
from tests.handmade import small_model, small_tokenizer
from tests.ranks import run_world

SMS = Path(__file__).parents[3] / "shared" / "data" / "task_sms_spam" / "train.jsonl"
WORKER = Path(__file__).with_name("worker.py")
STEPS = 6
LORA = ["objective.kind=instruct", "lora.r=4"]


def overrides(material: Path, name: str, *more: str) -> list[str]:
    data = "labelled" if "objective.kind=classify" in more else "answers"
    return [
        f"source={material}/source", f"data.train={material}/{data}.jsonl", "data.sequence_length=64",
        f"run.dir={material}/runs", f"run.name={name}", "run.sample_ids=true", "engine.precision=fp32",
        "train.batch=8", "train.micro_batch=4", f"train.duration={STEPS} steps", "optim.lr=3e-3",
        "schedule.kind=constant", "track.norms_every=3", *more,
    ]  # fmt: skip


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    small_tokenizer().save(folder)
    return folder


def bert(material: Path) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=300, max_position_embeddings=64, **sizes))
    return save(model, material / "bert")


def olmo2(material: Path) -> Path:
    return save(small_model("olmo2"), material / "olmo2")


def gpt2(material: Path) -> Path:
    return save(small_model("gpt2"), material / "gpt2")


def sms(material: Path) -> list[list[str]]:
    """A run on 2,000 real messages, where they are."""
    if not SMS.is_file():
        return []
    part = material / "sms.jsonl"
    part.write_bytes(b"".join(SMS.read_bytes().splitlines(keepends=True)[:2000]))
    more = ["objective.kind=classify", "objective.labels=['ham','spam']", f"data.train={part}", "train.batch=32"]
    more += ["train.micro_batch=32", "train.duration=2 epochs", "data.heldout_share=0.2", "eval.rows=0"]
    return [overrides(material, "sms", *more)]


def launch(material: Path, world: int, runs: list[list[str]]) -> None:
    """Run them; what was refused is in `material/refused.json` by the run's name."""
    plan = material / f"plan-{world}.json"
    plan.write_text(json.dumps(runs))
    run_world(WORKER, world, [str(plan), str(material / "refused.json")], timeout=300)


@pytest.fixture(scope="module")
def runs(material: Path) -> Path:
    """All runs on one rank."""
    labels = "objective.kind=classify"
    launch(
        material,
        1,
        [
            *(overrides(material, f"zero{s}", *LORA, f"engine.zero_stage={s}") for s in range(4)),
            overrides(material, "halves", *LORA, f"train.duration={STEPS // 2} steps"),
            overrides(material, "halves", *LORA),
            overrides(material, "whole", "objective.kind=instruct"),
            overrides(material, "classify", labels, "train.duration=3 epochs"),
            overrides(material, "halves-classify", labels, "lora.r=4", "train.duration=1 epochs"),
            overrides(material, "halves-classify", labels, "lora.r=4", "train.duration=2 epochs"),
            overrides(material, "classify-lora", labels, "lora.r=4", "train.duration=2 epochs"),
            overrides(material, "bert", labels, f"source={bert(material)}", "train.duration=6 epochs", "optim.lr=1e-3"),
            overrides(material, "olmo2", labels, f"source={olmo2(material)}", "train.duration=3 epochs"),
            overrides(material, "gpt2", *LORA, f"source={gpt2(material)}", "engine.precision=bf16"),
            overrides(material, "again", *LORA, f"source={material}/runs/zero2"),
            overrides(material, "zero2", *LORA, "data.heldout_share=0.2"),
            *sms(material),
            overrides(material, "target", *LORA, "lora.target_modules=['q']"),
            overrides(material, "mended", *LORA, "data.sequence_length=128"),  # beyond the source's positions
            overrides(material, "mended", *LORA),
        ],
    )
    return material / "runs"


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read(run / "ledger.jsonl") if e["event"] == kind]


def losses(run: Path) -> list[float]:
    return [float.fromhex(e["loss_hex"]) for e in events(run, "step")]


def newest(run: Path) -> Checkpoint:
    return Checkpoint(list_checkpoints(run / "checkpoints")[0])


def logits(model: Any, text: str, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tokenizer(text, return_tensors="pt")).logits


def test_base_is_the_source(runs: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(runs / "zero2" / "base")
    tokenizer = AutoTokenizer.from_pretrained(runs / "zero2" / "base")
    expected, found = (logits(m, "The mill stands", tokenizer) for m in (small_model("qwen3"), base))
    assert (expected - found).abs().max() <= 1e-5


def test_stages_agree(runs: Path) -> None:
    expected = losses(runs / "zero0")
    assert len(expected) == STEPS and expected[-1] < expected[0]
    for stage in (1, 2, 3):
        assert losses(runs / f"zero{stage}") == pytest.approx(expected, rel=1e-5), f"stage {stage}"


@pytest.mark.parametrize("pair", [("halves", "zero2"), ("halves-classify", "classify-lora")])
def test_stopped_and_resumed_is_one_run_to_the_bit(runs: Path, pair: tuple[str, str]) -> None:
    halves, whole = (runs / name for name in pair)
    assert len(events(halves, "resume")) == 1
    assert losses(halves) == losses(whole) and len(losses(whole)) > 5
    samples = [[e["samples"] for e in events(run, "step")] for run in (halves, whole)]
    assert samples[0] == samples[1]
    ends = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (halves, whole)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0].keys() | ends[1].keys())


@pytest.mark.parametrize("stage", range(4))
def test_only_adapters_are_trained(runs: Path, stage: int) -> None:
    checkpoint = newest(runs / f"zero{stage}")
    assert checkpoint.manifest["params"] and all(".lora_" in name for name in checkpoint.manifest["params"])
    base = load_file(runs / f"zero{stage}" / "base" / "model.safetensors")
    frozen = {n.removeprefix("model.").replace(".base_layer", ""): t for n, t in checkpoint.fixed().items()}
    assert base.keys() <= frozen.keys()
    assert all(torch.equal(frozen[key], tensor) for key, tensor in base.items())
    moved = [n for n in checkpoint.manifest["params"] if "lora_B" in n and checkpoint.master(n).abs().max() > 0]
    assert moved, "no adapter moved"
    grads = events(runs / f"zero{stage}", "norms")[0]["grad"]
    assert any(value > 0 for value in grads.values())


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3"])
def test_adapter_loads_in_peft_and_equals_the_merged_model(runs: Path, name: str) -> None:
    run = runs / name
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    base = AutoModelForCausalLM.from_pretrained(run / "base")
    plain = logits(base, "Say mill", tokenizer)
    adapted = logits(PeftModel.from_pretrained(base, str(run / "adapter")), "Say mill", tokenizer)
    merged = logits(AutoModelForCausalLM.from_pretrained(run / "merged"), "Say mill", tokenizer)
    assert (adapted - merged).abs().max() <= 1e-4
    assert (plain - merged).abs().max() > 1e-2
    assert "### Assistant" in tokenizer.chat_template


def test_all_weights_are_trained_without_adapters(runs: Path) -> None:
    run = runs / "whole"
    tuned, base = (AutoModelForCausalLM.from_pretrained(run / name) for name in ("model", "base"))
    there = dict(base.named_parameters())
    assert all(not torch.equal(p, there[n]) for n, p in tuned.named_parameters() if p.ndim > 1)
    assert losses(run)[-1] < losses(run)[0]
    assert not (run / "adapter").exists()


@pytest.mark.parametrize(("name", "folder"), [("classify", "model"), ("classify-lora", "merged")])
def test_classification_learns_and_its_folder_agrees(runs: Path, material: Path, name: str, folder: str) -> None:
    run = runs / name
    last = events(run, "eval")[-1]
    assert last["accuracy"] > 0.9 and last["tokens"] >= 10
    start = events(run, "start")[0]
    assert start["examples"]["train"] + start["examples"]["heldout"] == 300
    model = AutoModelForSequenceClassification.from_pretrained(run / folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / folder)
    assert model.config.id2label == {0: "mill", 1: "river", 2: "wheel"}
    records = [json.loads(line) for line in (material / "labelled.jsonl").read_text().splitlines()[:60]]
    batch = tokenizer([r["text"] for r in records], return_tensors="pt", padding=True)
    with torch.no_grad():
        named = [model.config.id2label[i] for i in model(**batch).logits.argmax(-1).tolist()]
    right = sum(n == r["label"] for n, r in zip(named, records, strict=True))
    assert right / len(records) > 0.9


@pytest.mark.skipif(not SMS.is_file(), reason="the SMS Spam Collection is not in ../shared/data")
def test_spam_is_told_from_ham(runs: Path) -> None:
    """Real messages, of which 87% are ham; a model of 0.1M random weights."""
    last = events(runs / "sms", "eval")[-1]
    assert last["tokens"] > 300
    assert last["accuracy"] > 0.9


@pytest.mark.parametrize("name", ["bert", "olmo2"])
def test_other_architectures_classify(runs: Path, name: str) -> None:
    """An encoder, and a decoder for which transformers has no classifier."""
    assert events(runs / name, "eval")[-1]["accuracy"] > 0.9
    folder = runs / name / "model"
    config = AutoConfig.from_pretrained(folder)
    register_classifier(config)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    text = "The wheel turns by 3"
    found = logits(model, text, AutoTokenizer.from_pretrained(folder))
    assert model.config.id2label[int(found.argmax())] == "wheel"


def test_hugging_face_folder_of_other_layers_takes_adapters(runs: Path) -> None:
    """GPT-2's linear layers are Conv1D; in bf16."""
    assert losses(runs / "gpt2")[-1] < losses(runs / "gpt2")[0]
    assert AutoModelForCausalLM.from_pretrained(runs / "gpt2" / "merged").config.model_type == "gpt2"


def test_tuned_run_is_a_source(runs: Path) -> None:
    assert losses(runs / "again")[0] < losses(runs / "zero2")[0]
    assert json.loads((runs / "again" / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(runs / "zero2" / "merged")


def test_classifier_adapter_loads_in_peft(runs: Path) -> None:
    run = runs / "classify-lora"
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(run / "merged")
    base = AutoModelForSequenceClassification.from_pretrained(run / "base", config=merged.config)
    adapted = PeftModel.from_pretrained(base, str(run / "adapter"))
    text = "The mill stands by 3"
    assert (logits(adapted, text, tokenizer) - logits(merged, text, tokenizer)).abs().max() <= 1e-4
    trained = {n for n in newest(run).manifest["params"] if ".lora_" not in n}
    assert trained == {"model.score.weight"}


def test_other_examples_are_refused_in_the_same_run(runs: Path) -> None:
    refused = json.loads((runs.parent / "refused.json").read_text())
    assert "already holds another run (examples" in refused["zero2"]
    assert [e["event"] for e in read(runs / "zero2" / "ledger.jsonl")].count("start") == 1


def test_unknown_target_modules_are_named(runs: Path) -> None:
    refused = json.loads((runs.parent / "refused.json").read_text())
    assert refused.keys() == {"zero2", "target", "mended"}
    assert "lora.target_modules = ['q'] fits no layer" in refused["target"] and "q_proj" in refused["target"]


def test_a_start_that_failed_does_not_bind_its_name(runs: Path) -> None:
    assert "128" in json.loads((runs.parent / "refused.json").read_text())["mended"]
    assert losses(runs / "mended") == losses(runs / "zero2")


def test_two_ranks_train_what_one_does(runs: Path, material: Path) -> None:
    stages = (2, 3)
    names = {s: f"two-zero{s}" for s in stages}
    launch(material, 2, [overrides(material, names[s], *LORA, f"engine.zero_stage={s}") for s in stages])
    expected, samples = losses(runs / "zero2"), [e["samples"] for e in events(runs / "zero2", "step")]
    for stage in stages:
        run = runs / names[stage]
        assert [e["samples"] for e in events(run, "step")] == samples
        assert losses(run) == pytest.approx(expected, rel=1e-5), f"stage {stage}"
        here, there = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (run, runs / "zero2"))
        assert here.keys() == there.keys()
        assert all(torch.allclose(here[k], there[k], atol=1e-5) for k in here)
