"""Nearest neighbours, the linear probe and labelled images, against brute force, another library and by hand."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModel

from millrace.data.labelled import LabelledImages
from millrace.data.prepare import PrepareConfig, prepare
from millrace.eval.encoder import open_encoder
from millrace.eval.probe import Labelled, Probe, neighbours
from millrace.launch.cli import main
from millrace.models.config import TowerConfig
from millrace.models.towers import build_encoder
from tests.handmade import small_model, write_checkpoint

VIT = {
    "image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip


def drawn(count: int, width: int = 6, classes: int = 3, seed: int = 0) -> Labelled:
    """Features of clusters that overlap."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    return Labelled(centres[labels] + 1.5 * torch.randn(count, width, generator=random), labels)


def test_neighbours_equal_brute_force() -> None:
    train, test = drawn(97), drawn(40, seed=1).features
    found = neighbours(train, test, count=7)
    for row, x in enumerate(test):
        similar = [float(x @ y / x.norm() / y.norm()) for y in train.features]
        votes = [0.0] * 3
        for place in sorted(range(97), key=lambda n: -similar[n])[:7]:
            votes[int(train.classes[place])] += math.exp(similar[place] / 0.07)
        assert int(found[row]) == votes.index(max(votes))
    assert len(found.unique()) == 3


def test_fewer_samples_than_neighbours_are_all_asked() -> None:
    train = Labelled(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    assert neighbours(train, torch.tensor([[3.0, 1.0], [1.0, 3.0]])).tolist() == [0, 1]


def test_probe_is_at_its_minimum() -> None:
    """The gradient by its formula is 0: of weights X'(p - y) + W, of biases the sum of p - y."""
    train = drawn(90)
    fitted = Probe(train)
    x = train.features.double()
    x = (x - x.mean(0)) / x.std(0)
    with torch.no_grad():
        logits = x @ fitted.weight_CD.T + fitted.bias_C
        wrong = torch.softmax(logits, 1) - torch.eye(3, dtype=torch.float64)[train.classes]
        assert (wrong.T @ x + fitted.weight_CD).abs().max() < 1e-3
        assert wrong.sum(0).abs().max() < 1e-3
        assert torch.equal(fitted(train.features), logits.argmax(1))


def test_probe_equals_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    train, test = drawn(90), drawn(60, seed=1).features
    scaled = [(x - train.features.mean(0)) / train.features.std(0) for x in (train.features, test)]
    theirs = linear.LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(scaled[0].numpy(), train.classes.numpy())
    ours = Probe(train)
    # theirs may hold any vector that all classes share in their biases
    bias = ours.bias_C.detach().numpy() - ours.bias_C.detach().numpy().mean()
    np.testing.assert_allclose(ours.weight_CD.detach().numpy(), theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(bias, theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4)
    assert ours(test).tolist() == theirs.predict(scaled[1].numpy()).tolist()


def picture(shade: int, side: int = 8) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((side, side + 2, 3), shade, np.uint8)).save(out, "PNG")
    return out.getvalue()


def corpus(folder: Path, labels: list[Any], **options: Any) -> str:
    """A manifest of pictures in shades of their labels."""
    shades = [30 + 60 * (number % 3) for number in range(len(labels))]
    images = [b"no picture" if label == "bad" else picture(shade) for label, shade in zip(labels, shades, strict=True)]
    labels = ["0" if label == "bad" else label for label in labels]
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"image": images, "kind": labels}), folder / "all.parquet", row_group_size=4)
    out = str(folder / "manifest")
    prepare(PrepareConfig(inputs=[str(folder / "all.parquet")], out=out, image="image", count_tokens=False, **options))
    return out


@pytest.mark.parametrize("kind", [int, str])
def test_labels_are_read_beside_the_images(tmp_path: Path, kind: Any) -> None:
    manifest = corpus(tmp_path / "a", [kind(number % 3) for number in range(11)])
    images, labels = zip(*LabelledImages(manifest, "kind", 8).batches(3), strict=True)
    assert [name for part in labels for name in part] == [str(number % 3) for number in range(11)]
    shades = np.concatenate(images)
    assert shades.shape == (11, 8, 8, 3) and shades[:, 0, 0, 0].tolist() == [30 + 60 * (n % 3) for n in range(11)]


def test_images_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    given = LabelledImages(corpus(tmp_path / "a", ["1", "bad", "0"], on_bad="skip"), "kind", 8)
    assert [name for _, names in given.batches(2) for name in names] == ["1", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model is an encoder of images."""
    folder = tmp_path_factory.mktemp("runs") / "vit"
    encoder: Any = build_encoder(TowerConfig(modality="image", kind="vit", config=VIT), 0, 0, None)
    encoder.config.architectures = ["ViTModel"]
    write_checkpoint(folder / "checkpoints", encoder)
    return folder


def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shades can be told apart by any encoder's features."""
    train = corpus(tmp_path / "a", [number % 3 for number in range(60)], heldout=0.25, heldout_by="nth")
    for extra in ([], ["--untrained"]):
        out = tmp_path / "result.json"
        assert main(["eval", str(run), "--probe", train, "--label", "kind", "--out", str(out), *extra]) == 0
        found = json.loads(out.read_text())
        assert found["probe"]["linear"] == found["probe"]["knn"] == 1.0
        assert found["probe"]["heldout"] == 15 and found["probe"]["classes"] == ["0", "1", "2"]
        assert found["source"]["step"] == (None if extra else 7)
    assert "linear probe" in capsys.readouterr().err


def test_two_manifests_and_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = corpus(tmp_path / "a", [number % 3 for number in range(12)])
    other = corpus(tmp_path / "b", [7, 7])
    out = str(tmp_path / "result.json")
    assert main(["eval", str(run), "--probe", one, one, "--label", "kind", "--out", out]) == 0
    for arguments, why in (
        (["--probe", one], "has no held-out part"),
        (["--probe", one, one, "--label", "kin"], "has no column 'kin'; did you mean 'kind'?"),
        (["--probe", one, other, "--label", "kind"], "has the label '7'"),
        (["--probe", other, one, "--label", "kind"], "has the value 7 only; a probe needs two classes"),
        (["--probe", one, "--tasks", "x.jsonl"], "are for different models"),
    ):
        capsys.readouterr()
        assert main(["eval", str(run), *arguments, "--out", out]) == 1
        assert why in capsys.readouterr().err.replace("\n", " ")


def test_what_is_no_encoder_of_images_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "text" / "checkpoints", small_model("qwen3"))
    one = corpus(tmp_path / "a", [0, 1])
    assert main(["eval", str(tmp_path / "text"), "--probe", one, one]) == 1
    assert "is no encoder of images" in capsys.readouterr().err.replace("\n", " ")


def test_export_loads_elsewhere_with_equal_features(run: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    out = tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    theirs = AutoModel.from_pretrained(out, add_pooling_layer=False)
    pixels = torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1
    expected = theirs(pixel_values=pixels).last_hidden_state.mean(1).detach()
    torch.testing.assert_close(open_encoder(run).features(images), expected)
    torch.testing.assert_close(open_encoder(out).features(images), expected)


def test_group_norms_are_judged_and_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}
    encoder: Any = build_encoder(TowerConfig(modality="image", kind="resnet", config=sizes), 0, 0, None)
    assert {type(part).__name__ for part in encoder.modules()} & {"BatchNorm2d", "GroupNorm"} == {"GroupNorm"}
    encoder.config.architectures = ["ResNetModel"]
    path = write_checkpoint(tmp_path, encoder)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    pixels = torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1
    expected = encoder(pixel_values=pixels).pooler_output.flatten(1).detach()
    torch.testing.assert_close(open_encoder(path).features(images), expected)
    assert main(["export", str(path), str(tmp_path / "out")]) == 1
    assert "group norms in place of batch norms" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_an_encoder_sees_what_training_saw(run: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    encoder: Any = build_encoder(TowerConfig(modality="image", kind="vit", config=VIT), 0, 0, None)
    pixels = torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1
    expected = encoder(pixel_values=pixels).last_hidden_state.mean(1)
    opened = open_encoder(run)
    torch.testing.assert_close(opened.features(images), expected.detach())
    assert opened.size == 8 and opened.width == 16
