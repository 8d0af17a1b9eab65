"""Learning from a teacher: its loss and gradient document by document, and teachers that are refused.

That it is the same at every stage and on any ranks, and resumes, is in `test_objectives`.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from millrace.core.config import load_config
from millrace.core.errors import UserError
from millrace.data.loader import build_loader
from millrace.pretrain.config import PretrainConfig
from millrace.pretrain.objectives.distillation import Distillation
from millrace.pretrain.run import objective_of
from tests.handmade import small_model, small_tokenizer, write_checkpoint

HEAT, WEIGHT = 2.0, 0.4


@pytest.fixture(scope="module")
def batch(config_file: Path) -> Any:
    """Eight packed rows, and the tokenizer."""
    config = load_config(PretrainConfig, config_file)
    with build_loader(config.data, seed=0, batch_rows=8, micro_batch=8, rank=0, world=1) as loader:
        return next(loader).micro_batches[0], loader.tokenizer


@pytest.fixture(scope="module")
def teacher(batch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory: an architecture of its own, with spare rows behind the vocabulary."""
    folder = tmp_path_factory.mktemp("runs") / "big"
    model = small_model("llama", hidden_size=48, vocab_size=384)
    write_checkpoint(folder / "checkpoints", model, batch[1])
    return folder


def built(config_file: Path, teacher: Path, tokenizer: Any, *more: str) -> Distillation:
    section = [f'objective.teacher="{teacher}"', f"objective.temperature={HEAT}", f"objective.weight={WEIGHT}"]
    config = load_config(PretrainConfig, config_file, ['objective.kind="distillation"', *section, *more])
    kind, setting = objective_of(config, {"zero_optimization": {"stage": 0}}, tokenizer)
    kind.check(setting)
    made = kind.build(setting)
    assert isinstance(made, Distillation)
    return made


def test_equals_plain_torch_document_by_document(config_file: Path, teacher: Path, batch: Any) -> None:
    """Formulas of the paper's section 2, with each document alone in student and teacher."""
    micro, tokenizer = batch
    module: Any = built(config_file, teacher, tokenizer).modules["model"]
    loss, figures = module(**module.inputs(micro, torch.device("cpu")))
    got = torch.autograd.grad(loss, list(module.parameters()))
    assert sum(len(lengths) > 1 for lengths in micro.seq_lens) > 1  # packed
    student, theirs = small_student(module), small_model("llama", hidden_size=48, vocab_size=384)
    nll, divergence = torch.zeros(()), torch.zeros(())
    for row, lengths in enumerate(micro.seq_lens):
        for part in torch.arange(sum(lengths)).split(lengths):
            ids, labels = micro.input_ids_BT[row, part][None], micro.labels_BT[row, part]
            mine, told = (model(input_ids=ids, use_cache=False).logits[0] for model in (student, theirs))
            keep = labels != -100
            nll = nll + F.cross_entropy(mine[keep], labels[keep], reduction="sum")
            p, q = (torch.softmax(x[keep, : tokenizer.vocab_size] / HEAT, -1) for x in (told.detach(), mine))
            divergence = divergence + (p * (p.log() - q.log())).sum()
    wanted = (1 - WEIGHT) * nll + WEIGHT * HEAT**2 * divergence
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(figures[:2], torch.stack([nll, divergence]).detach(), rtol=1e-4, atol=0)
    expected = torch.autograd.grad(wanted, list(student.parameters()))
    for ours, plain in zip(got, expected, strict=True):
        assert (ours - plain).abs().max() < 1e-5 * plain.abs().max()


def small_student(module: Any) -> Any:
    """A copy of the module's model that computes its logits as transformers does."""
    from millrace.models.bridge import build_model
    from millrace.models.config import ModelConfig

    config = module.model.config
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    table = {name: getattr(config, name) for name in (*sizes, "head_dim", "vocab_size")}
    made = build_model(ModelConfig(kind="qwen3", config=table), config.vocab_size, 64, 1)
    made.load_state_dict(module.model.state_dict())
    return made


def test_a_folder_of_the_same_weights_is_the_same_teacher(
    config_file: Path, teacher: Path, batch: Any, tmp_path: Path
) -> None:
    small_model("llama", hidden_size=48, vocab_size=384).save_pretrained(tmp_path)
    batch[1].save(tmp_path)
    ours, theirs = (built(config_file, path, batch[1]).modules["model"] for path in (teacher, tmp_path))
    assert torch.equal(ours.teacher_sha256, theirs.teacher_sha256)  # type: ignore[arg-type]


def test_the_teacher_is_no_part_of_the_engine(config_file: Path, teacher: Path, batch: Any) -> None:
    objective = built(config_file, teacher, batch[1])
    names = [name for name, _ in objective.modules["model"].named_parameters()]
    assert names and all(name.startswith("model.") for name in names)
    assert list(dict(objective.modules["model"].named_buffers(recurse=False))) == ["teacher_sha256"]


def engines(module: Any, *others: tuple[str, str]) -> Any:
    """What a check asks of them; `others` are what other ranks would say."""
    world = SimpleNamespace(gather_objects=lambda mine: [mine, *others])
    return SimpleNamespace(main=SimpleNamespace(module=module), world=world)


def test_a_changed_teacher_is_refused_by_name(config_file: Path, teacher: Path, batch: Any) -> None:
    objective = built(config_file, teacher, batch[1])
    module: Any = objective.modules["model"]
    found = bytes(module.teacher_sha256.tolist()).hex()
    objective._teacher.check(engines(module, (found, found)))
    with pytest.raises(UserError, match="big' is not the teacher that this run began with"):
        objective._teacher.check(engines(module, (found, "0" * 64)))
    module.teacher_sha256 += 1  # as a checkpoint of another would have it
    with pytest.raises(UserError, match=f"SHA-256 of weights .*{found[:12]}"):
        next(objective.losses([], engines(module)))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["data.sequence_length=65"], "has 64 positions, fewer than data.sequence_length = 65"),
        (['objective.teacher=""'], "objective.teacher is not set"),
        (['objective.teacher="./nowhere"'], "no run directory, checkpoint or folder ./nowhere"),
        (["objective.weight=0.0"], "a weight above 0 and at most 1"),
        (["objective.temperature=0.0"], "a temperature above 0"),
    ],
)
def test_bad_sections(config_file: Path, teacher: Path, batch: Any, more: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        built(config_file, teacher, batch[1], *more)


def test_another_tokenizer_is_refused_by_name(config_file: Path, batch: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoints", small_model(), small_tokenizer())
    theirs, ours = small_tokenizer().sha256[:12], batch[1].sha256[:12]
    with pytest.raises(UserError, match=rf"has another tokenizer \({theirs}\) than the data \({ours}\)"):
        built(config_file, tmp_path, batch[1])


def test_a_recurrent_teacher_cannot_read_packed_rows(config_file: Path, batch: Any, tmp_path: Path) -> None:
    from millrace.models.bridge import build_model
    from millrace.models.config import ModelConfig

    model = build_model(
        ModelConfig(kind="xlstm", config={"hidden_size": 32, "num_heads": 2, "num_hidden_layers": 1}),
        batch[1].vocab_size,
        64,
        0,
    )
    write_checkpoint(tmp_path / "checkpoints", model, batch[1])
    with pytest.raises(UserError, match="'xlstm' cannot be trained on packed documents"):
        built(config_file, tmp_path, batch[1])
