"""Models that see: the same at all ZeRO stages and ranks, with and without images; plain transformers as reference."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from millrace.core.errors import UserError
from tests.pretrain.pictured import EOS, PATCH, T, documents, pictured, rows_of, square
from tests.pretrain.samples_worker import LR, ROWS, objective_of
from tests.pretrain.stages import STAGES, Found

CPU = torch.device("cpu")
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _of(kind: str = "qwen3", vision: dict[str, Any] | None = None, **objective: Any) -> dict[str, Any]:
    return {
        "objective": {"kind": "vision_language", "vision": vision or {"config": VISION}} | objective,
        "model": {"kind": kind, "config": TEXT},
        "setting": {"rows": "packed", "sequence_length": T, "costs": {"image": {"patch": PATCH, "most": 9}}},
        "batches": "pictured:pictured",
    }


MAMBA2 = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 16}
CLIP = {"kind": "clip_vision_model", "config": VISION | {"image_size": 2 * PATCH}}
SIGLIP = {"kind": "siglip_vision_model", "config": VISION | {"image_size": 2 * PATCH}}
KINDS = {
    "qwen3": _of(),
    "llama": _of("llama"),
    "projector": _of(train=["projector"]),
    "clip": _of(vision=CLIP) | {"batches": "pictured:square"},
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(tmp_path_factory.mktemp("quick"), {"qwen3": KINDS["qwen3"]}, ("zero0", "zero3"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(tmp_path_factory.mktemp("seeing"), KINDS, STAGES)


def test_without_and_with_sharding(quick: Found) -> None:
    quick.check("qwen3")


@pytest.mark.slow
@pytest.mark.timeout(1100)
@pytest.mark.parametrize("kind", KINDS)
def test_at_every_stage(found: Found, kind: str) -> None:
    found.check(kind)


def test_equals_plain_transformers(quick: Found) -> None:
    """Every document alone through the model's own forward, with its own loss."""
    result = quick.results["qwen3 2 zero3 whole"]
    losses = [step[0] for step in result["found"]]
    assert losses == pytest.approx(list(_reference(KINDS["qwen3"], len(losses))), rel=1e-4)


def _reference(sections: dict[str, Any], steps: int) -> Iterator[float]:
    objective: Any = objective_of(sections)
    model = objective.modules["model"].model
    optimiser = torch.optim.AdamW(model.parameters(), LR)
    for number in range(steps):
        losses, targets = [], 0
        for row in range(ROWS):
            for image, text in documents(number, row):
                losses.append(_plain(objective, image, text))
                targets += len(text) + 1
        optimiser.zero_grad(set_to_none=False)
        loss = sum(losses) / targets
        loss.backward()
        for param in model.parameters():
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        optimiser.step()
        yield loss.item()


def _plain(objective: Any, image: np.ndarray | None, text: np.ndarray) -> torch.Tensor:
    """The summed loss of one document by transformers alone."""
    view = objective.view(rows_of([[(image, text)]]))
    model, length = objective.modules["model"].model, int(view.row_spans[0][0, 2])
    ids = torch.cat([view.input_ids_BT[0, :length], torch.tensor([EOS])])[None]
    given: dict[str, Any] = {}
    if image is not None:
        (medium,) = view.media
        given["pixel_values"] = medium.value.permute(2, 0, 1)[None] / 127.5 - 1
        if "image_sizes" in objective.modules["model"].inputs(view, CPU)["images"]:
            given["image_sizes"] = torch.tensor([medium.value.shape[:2]])
    labels = torch.where(torch.arange(length + 1) > length - len(text) - 1, ids[0], -100)[None]
    mean = model(input_ids=ids, labels=labels, use_cache=False, **given).loss
    return mean * (len(text) + 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "vision"),
    [("qwen3", None), ("llama", None), ("qwen3", CLIP), ("qwen3", SIGLIP)],
    ids=["qwen3", "llama", "clip", "siglip"],
)
def test_packed_equals_alone(kind: str, vision: dict[str, Any] | None) -> None:
    """Loud weights, so that a leak between documents, or between images, shows."""
    objective: Any = objective_of(_of(kind, vision))
    module = objective.modules["model"]
    with torch.no_grad():
        for param in module.parameters():
            if param.ndim > 1:
                param *= 3
    pieces = documents(0, 1, (1, 2, 3) if vision is None else (2,))
    assert sum(image is not None for image, _ in pieces) == 2
    rows = [pieces, documents(2, 0)]
    together = module(**module.inputs(objective.view(rows_of(rows)), CPU))[0]
    alone = sum(_plain(objective, image, text) for row in rows for image, text in row)
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)
    hidden = [(None if image is None else 255 - image, text) for image, text in pieces]
    other = module(**module.inputs(objective.view(rows_of([hidden, rows[1]])), CPU))[0]
    assert abs(other.item() - together.item()) > 1e-3, "images change what is read"


def test_images_of_several_sizes_at_once() -> None:
    """Each as alone: attention by image is what transformers' mask over all of them computes."""
    from millrace.models.vision_language import image_features, pixels

    model = objective_of(_of()).modules["model"].model
    random = np.random.default_rng(0)
    images = [torch.from_numpy(random.integers(0, 255, (h * PATCH, w * PATCH, 3), np.uint8))
              for h, w in ((1, 3), (4, 2), (1, 1))]  # fmt: skip
    given = pixels(images, model.config, CPU)
    found = image_features(model, **given)
    assert found.shape == (3 + 8 + 1, TEXT["hidden_size"])
    alone = torch.cat([image_features(model, **pixels([image], model.config, CPU)) for image in images])
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(model.get_image_features(**given).pooler_output), found)
    model.model.vision_tower.config._attn_implementation = "sdpa"
    masked = torch.cat(model.get_image_features(**given).pooler_output)
    torch.testing.assert_close(found, masked, rtol=1e-5, atol=1e-6)


def test_without_images_the_encoder_gets_a_gradient_of_zero() -> None:
    objective: Any = objective_of(_of())
    module = objective.modules["model"]
    loss, _ = module(**module.inputs(objective.view(pictured(2, 0, 4)), CPU))
    loss.backward()
    gradients = {name: param.grad for name, param in module.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    silent = {name for name, gradient in gradients.items() if not gradient.any()}
    assert {name for name in gradients if "vision_tower" in name or "projector" in name} <= silent
    assert not any("language_model" in name for name in silent)


def test_view_puts_whole_patches_in_order() -> None:
    objective: Any = objective_of(_of())
    batch = pictured(0, 0, 3)
    before = batch.input_ids_BT.clone()
    view = objective.view(batch)
    assert torch.equal(batch.input_ids_BT, before), "the loader's batch stays what it is"
    assert [(m.row, m.start) for m in view.media] == sorted((m.row, m.start) for m in batch.media)
    seen = torch.zeros_like(before, dtype=torch.bool)
    for medium in view.media:
        height, width, _ = medium.value.shape
        assert not (height % PATCH or width % PATCH) and height * width == medium.positions * PATCH**2
        seen[medium.row, medium.start : medium.start + medium.positions] = True
    assert torch.equal(view.input_ids_BT == 50, seen) and torch.equal(view.input_ids_BT[~seen], before[~seen])
    assert objective.targets(view) == objective.targets(batch) > 0


@pytest.mark.parametrize(("vision", "idle"), [(None, []), (CLIP, ["post_layernorm"]), (SIGLIP, ["post_layernorm"])])
def test_what_no_feature_depends_on_is_not_trained(vision: dict[str, Any] | None, idle: list[str]) -> None:
    module: Any = objective_of(_of(vision=vision)).modules["model"]
    loss, _ = module(**module.inputs(module_view(vision), CPU))
    loss.backward()
    still = {name for name, param in module.named_parameters() if param.grad is None}
    assert still == {name for name, param in module.named_parameters() if not param.requires_grad}
    assert {name.split(".")[-2] for name in still} == set(idle)


def module_view(vision: dict[str, Any] | None) -> Any:
    return objective_of(_of(vision=vision)).view((pictured if vision is None else square)(0, 0, 2))


def test_only_what_is_named_is_trained() -> None:
    module: Any = objective_of(_of(train=["projector"])).modules["model"]
    trained = {name for name, param in module.named_parameters() if param.requires_grad}
    assert trained == {name for name, _ in module.named_parameters() if "multi_modal_projector" in name}


def test_from_folders(tmp_path: Path) -> None:
    """A decoder and an encoder that were saved alone, and then the whole."""
    first: Any = objective_of(_of()).modules["model"].model
    from transformers import Qwen3ForCausalLM

    causal = Qwen3ForCausalLM(first.config.text_config)
    causal.save_pretrained(tmp_path / "text")
    first.model.vision_tower.save_pretrained(tmp_path / "vision")
    sections = _of(vision={"init": str(tmp_path / "vision")}, kind="gpt2") | {"model": {"init": str(tmp_path / "text")}}
    both: Any = objective_of(sections).modules["model"].model
    _same(both.model.language_model, causal.model)
    _same(both.model.vision_tower, first.model.vision_tower)
    _same(both.lm_head, causal.lm_head)
    both.save_pretrained(tmp_path / "whole")
    sections = _of() | {"model": {"init": str(tmp_path / "whole")}}
    sections["objective"] = {"kind": "vision_language"}
    whole: Any = objective_of(sections).modules["model"].model
    _same(whole, both)
    assert whole.config.text_config._attn_implementation == "documents"
    with pytest.raises(UserError, match=r"leave model.config and objective.vision out"):
        objective_of(sections | {"objective": {"kind": "vision_language", "vision": {"config": VISION}}})


def _same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    there = dict(other.named_parameters())
    assert {name for name, _ in one.named_parameters()} == set(there)
    assert all(torch.equal(param, there[name]) for name, param in one.named_parameters())


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        (_of(train=["eyes"]), "name some of vision, projector, text"),
        (_of(vision={"kind": "vit", "config": VISION}), "'vit' is no encoder"),
        (
            _of(vision={"config": VISION | {"patch_size": 16}}),
            "of 16 pixels.*by patches of 8.*--image-patch 16",
        ),
        (_of(vision={"config": VISION | {"depth": 16}}), "unknown key 'objective.vision.config.depth'"),
        (_of(vision={"config": VISION | {"hidden_size": 36}}), "heads of 18"),
        (_of() | {"setting": {"rows": "samples", "sequence_length": T, "costs": {"image": {}}}}, "'packed' or 'alone'"),
        (_of() | {"setting": {"rows": "packed", "sequence_length": T}}, "needs samples of images and text"),
        (_of() | {"model": {"kind": "cohere", "depth": 1}}, "changes its logits after the head"),
        (_of() | {"model": {"kind": "mamba2", "config": MAMBA2}}, "is recurrent"),
    ],
)
def test_bad_sections(sections: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        objective_of(sections)


def test_several_sizes_need_an_encoder_for_them() -> None:
    objective: Any = objective_of(_of(vision=CLIP))
    with pytest.raises(UserError, match=r"an encoder for 16 x 16: set .*'pixtral' for images of several sizes"):
        objective.view(pictured(0, 0, 4))
