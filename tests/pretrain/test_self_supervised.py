"""Self-supervised encoders: the same at all ZeRO stages, ranks and micro-batches, by the papers' formulas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from millrace.core.errors import UserError
from millrace.data.prepare import PrepareConfig, prepare
from millrace.engine.teacher import follow
from millrace.eval.encoder import open_encoder
from millrace.launch.cli import main
from tests.eval.test_probe import picture
from tests.pretrain.samples_worker import BAD, LR, ROWS, objective_of, samples
from tests.pretrain.stages import HALF, STAGES, Found

_SMALL: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip
_DECODER = {
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}  # fmt: skip
_CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2, "initializer_range": 0.2}
_RESNET = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}
_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_DINO = {"kind": "self_distillation", "outputs": 24, "hidden": 16, "bottleneck": 8, "decay": 0.9, "centre": 0.5}


def _mae(share: float = 0.75, **config: Any) -> dict[str, Any]:
    sizes = _SMALL | _DECODER | config
    return {"objective": {"kind": "masked_image", "share": share}, "model": {"kind": "vit_mae", "config": sizes}}


def _dino(kind: str, config: dict[str, Any], **section: Any) -> dict[str, Any]:
    return {"objective": _DINO | section, "model": {"kind": kind, "config": config}}


def _towers(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    towers = [{"modality": "image", "kind": kind, "config": config}, {"modality": "text", "config": _TEXT}]
    return {"objective": {"kind": "contrastive", "towers": towers, "width": 12}, "model": {}}


QUICK = {"masked": _mae(), "distilled": _dino("vit", _SMALL)}
KINDS = QUICK | {
    "distilled convnextv2": _dino("convnextv2", _CONVNEXT),
    "distilled resnet": _dino("resnet", _RESNET),
    "contrastive convnextv2": _towers("convnextv2", _CONVNEXT),
    "contrastive resnet": _towers("resnet", _RESNET),
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(tmp_path_factory.mktemp("quick"), QUICK, ("zero0", "zero3"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(tmp_path_factory.mktemp("encoders"), KINDS, STAGES)


@pytest.mark.parametrize("kind", QUICK)
def test_without_and_with_sharding(quick: Found, kind: str) -> None:
    quick.check(kind)


@pytest.mark.slow
@pytest.mark.timeout(1100)
@pytest.mark.parametrize("kind", KINDS)
def test_at_every_stage(found: Found, kind: str) -> None:
    found.check(kind)


def saved(found: Found, kind: str, folder: Path) -> list[Path]:
    """Checkpoints of two stages, and what was exported of one."""
    checkpoints = [found.checkpoint(kind, stage) for stage in ("zero0", "zero3")]
    assert main(["export", str(checkpoints[1]), str(folder / "out")]) == 0
    return [*checkpoints, folder / "out"]


def test_masked_equals_transformers(quick: Found, tmp_path: Path) -> None:
    """The loss that transformers' own forward gives of the good pictures, stepped by plain torch."""
    objective: Any = objective_of(QUICK["masked"])
    module, expected = objective.modules["model"], []
    optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], LR)
    good = torch.tensor([row != BAD for row in range(ROWS)])
    for number in range(HALF):
        batch = samples(number, 0, ROWS)
        noise = module.inputs(batch, torch.device("cpu"))["noise_BP"]
        pixels = batch.values["image"].movedim(-1, 1).float() / 127.5 - 1
        loss = module.model(pixel_values=pixels[good], noise=noise[good]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        expected.append(loss.item())
    result = quick.results["masked 2 zero3 whole"]["found"][:HALF]
    assert [step[0] for step in result] == pytest.approx(expected, rel=1e-4)
    # what is judged afterwards is its encoder, which then sees all patches
    module.model.config.mask_ratio = 0.0
    images = samples(0, 0, ROWS).values["image"]
    expected_BD = module.model.vit(pixel_values=images.permute(0, 3, 1, 2) / 127.5 - 1).last_hidden_state.mean(1)
    for path in saved(quick, "masked", tmp_path):
        found_BD = open_encoder(path).features(images.numpy())
        torch.testing.assert_close(found_BD, expected_BD.detach(), rtol=1e-3, atol=1e-4)


def test_hidden_patches_are_drawn_for_each_picture() -> None:
    objective: Any = objective_of(_mae(share=0.6))
    module, batch = objective.modules["model"], samples(0, 0, ROWS)
    given = module.inputs(batch, torch.device("cpu"))
    other = module.inputs(samples(0, 2, 6), torch.device("cpu"))
    assert torch.equal(given["noise_BP"][2:6], other["noise_BP"])  # however rows are dealt
    mask = module.model(pixel_values=torch.zeros(ROWS, 3, 16, 16), noise=given["noise_BP"]).mask
    assert (mask.sum(1) == 10).all()  # int(16 * 0.4) are seen
    assert len({tuple(row.tolist()) for row in mask}) == ROWS


def test_the_decoder_knows_where_patches_are() -> None:
    """transformers draws a model whose decoder positions are 0: all hidden patches of a picture would look alike."""
    model: Any = objective_of(_mae()).modules["model"].model
    again: Any = objective_of(_mae()).modules["model"].model
    positions = model.decoder.decoder_pos_embed
    assert torch.equal(positions, model.vit.embeddings.position_embeddings)  # both 16 wide here; sines and cosines
    assert len(positions[0].unique(dim=0)) == 17 and not positions.requires_grad
    assert torch.equal(model.decoder.mask_token, again.decoder.mask_token) and model.decoder.mask_token.std() > 0.005


def test_distilled_equals_the_paper(quick: Found, tmp_path: Path) -> None:
    """Algorithm 1 on the whole batch, pair by pair of views."""
    result = quick.results["distilled 2 zero3 whole"]["found"][:HALF]
    teacher: Any = objective_of(QUICK["distilled"]).modules["model"]
    for step, expected in zip(result, _reference(QUICK["distilled"], teacher, HALF), strict=True):
        assert step[:2] == pytest.approx(expected, rel=1e-4)
    # what is judged afterwards is the teacher
    images = samples(0, 0, ROWS).values["image"]
    pixels = images.permute(0, 3, 1, 2) / 127.5 - 1
    for path in saved(quick, "distilled", tmp_path):
        expected_BD = teacher.student(pixel_values=pixels).last_hidden_state.mean(1).detach()
        torch.testing.assert_close(open_encoder(path).features(images.numpy()), expected_BD, rtol=1e-3, atol=1e-4)


def _reference(sections: dict[str, Any], teacher: Any, steps: int) -> Iterator[list[float]]:
    student: Any = objective_of(sections).modules["model"]
    kept, centre = [row for row in range(ROWS) if row != BAD], torch.zeros(24)
    pairs = [(student.student, teacher.student), (student.projection, teacher.projection)]
    optimiser = torch.optim.AdamW([p for part, _ in pairs for p in part.parameters()], LR)

    def outputs(of: Any, picture: torch.Tensor) -> torch.Tensor:
        pixels = picture[kept].permute(0, 3, 1, 2) / 127.5 - 1
        states = of.student(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state.mean(1)
        head = of.projection
        return F.normalize(head.layers(states), dim=1) @ F.normalize(head.last.weight, dim=1).T

    for number in range(steps):
        batch = samples(number, 0, ROWS)
        views = [batch.values[name] for name in ("large0", "large1", "small0")]
        with torch.no_grad():
            wanted = [outputs(teacher, view) for view in views[:2]]
        said = [outputs(student, view) for view in views]
        losses, entropies = [], []
        for a, target in enumerate(wanted):
            p = torch.softmax((target - centre) / 0.04, 1)
            entropies.append(-(p * p.log()).sum(1).mean())
            losses += [-(p * torch.log_softmax(s / 0.1, 1)).sum(1).mean() for b, s in enumerate(said) if a != b]
        loss = torch.stack(losses).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        centre = 0.5 * centre + 0.5 * torch.cat(wanted).mean(0)
        with torch.no_grad():
            for mine, theirs in pairs:
                for s, t in zip(mine.parameters(), theirs.parameters(), strict=True):
                    t.copy_(0.9 * t + 0.1 * s)
        yield [loss.item(), torch.stack(entropies).mean().item()]


def test_a_teacher_in_bf16_follows_slowly_too() -> None:
    """Against the closed form; without what it keeps beside its weights it would stand still."""
    student, teacher, alone, rest = (torch.nn.Linear(64, 64, dtype=torch.bfloat16) for _ in range(4))
    with torch.no_grad():
        for parameter in rest.parameters():
            parameter.zero_()
    alone.load_state_dict(teacher.state_dict())
    first, aim = teacher.weight.double().clone(), student.weight.double()
    for _ in range(200):
        follow(teacher, student, 0.996, rest)
        follow(alone, student, 0.996)
    expected = aim + (first - aim) * 0.996**200
    error, lost = ((part.weight - expected).norm() / (first - aim).norm() for part in (teacher, alone))
    assert error < 0.01 < 0.1 < lost


def test_a_step_that_is_not_taken_moves_neither_teacher_nor_centre() -> None:
    class Engines:
        class main:
            module: Any = None

    objective: Any = objective_of(QUICK["distilled"])
    module = Engines.main.module = objective.modules["model"]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    follow(
        module.student, objective_of(_dino("vit", _SMALL | {"initializer_range": 0.3})).modules["model"].student, 0.5
    )
    for taken in (False, True):
        objective._seen = torch.ones(25, dtype=torch.float64)
        objective.end_step(Engines, taken=taken)
        moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
        assert any(name.startswith("model.") for name in moved) is taken
        assert ("centre" in moved) is taken


@pytest.mark.slow
def test_the_image_tower_of_a_contrastive_run_is_judged(tmp_path: Path) -> None:
    """From the command line: text and pictures, ZeRO 3, then a probe of the tower, and of one with random weights."""
    rows = [{"image": picture(30 + 60 * (n % 3)), "text": "a mill " * (1 + n % 3), "kind": n % 3} for n in range(60)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "all.parquet")
    out = str(tmp_path / "pairs")
    given = PrepareConfig(
        inputs=[str(tmp_path / "all.parquet")], out=out, image="image", text="text", vocab_size=300,
        heldout=0.25, heldout_by="nth",
    )  # fmt: skip
    prepare(given)
    towers = f"[{{modality='image', kind='vit', config={_toml(_SMALL)}}}, {{modality='text', config={_toml(_TEXT)}}}]"
    recipe = ["objective.kind=contrastive", f"objective.towers={towers}", f"data.manifest={out}", "data.rows=samples"]
    recipe += ["data.views=[{role='image', size=16}]", "train.duration=2 steps", "train.batch=8", "train.micro_batch=4"]
    recipe += ["engine.zero_stage=3", f"run.dir={tmp_path}", "run.name=run"]
    assert main(["pretrain", *recipe]) == 0
    for extra in ([], ["--untrained"]):
        result = tmp_path / "result.json"
        assert (
            main(["eval", str(tmp_path / "run"), "--probe", out, "--label", "kind", "--out", str(result), *extra]) == 0
        )
        assert json.loads(result.read_text())["probe"]["linear"] == 1.0


def _toml(table: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}={value}" for key, value in table.items()) + "}"


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({**_mae(), "model": {"kind": "vit"}}, "trains model.kind = 'vit_mae', not 'vit'"),
        (_mae(image_size=18), "image_size = 18 must be a multiple of patch_size = 4"),
        (_mae(share=0.99), "must hide some of the 16 patches and not all"),
        (_dino("vit", _SMALL, sharpness=0.2), "0 < sharpness <= temperature"),
        ({**_dino("vit", {}), "model": {"kind": "vit", "init": "folder"}}, "begins with random weights"),
    ],
)
def test_bad_sections(sections: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        objective_of(sections)


def test_views_that_do_not_fit_are_told() -> None:
    batch, device = samples(0, 0, 2), torch.device("cpu")
    masked: Any = objective_of(_mae(image_size=32)).modules["model"]
    with pytest.raises(UserError, match="pictures are 16 x 16 x 3 and the model is for 32 x 32 x 3"):
        masked.inputs(batch, device)
    distilled: Any = objective_of(_dino("vit", _SMALL, large="audio", small="")).modules["model"]
    with pytest.raises(UserError, match="name in data.views two or more of a picture"):
        distilled.inputs(batch, device)
