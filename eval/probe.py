"""What the features of a frozen encoder are worth: nearest neighbours and a linear probe, on labelled images.

Nearest neighbours vote by cosine similarity (Wu et al., https://arxiv.org/abs/1805.01978, section 3.4), as DINO's do.
The probe is a multinomial logistic regression. N samples of training, M of the held-out part, D width, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from millrace.core.console import warn
from millrace.core.errors import UserError
from millrace.data.config import DataConfig
from millrace.data.labelled import LabelledImages
from millrace.data.loader import heldout_manifests
from millrace.eval.encoder import Encoder

NEIGHBOURS, TEMPERATURE = 20, 0.07
_ROWS = 1024  # of similarities that are held at once
_MOST = 500  # iterations of the probe


@dataclass(frozen=True)
class Labelled:
    """Features float32 (N, D), and classes int64 (N,)."""

    features: Tensor
    classes: Tensor


def probe(encoder: Encoder, manifests: Sequence[str], label: str, batch: int = 64) -> dict[str, Any]:
    """Shares of held-out images that are classified rightly: {"knn", "linear", "train", "heldout", "classes", "width"}.

    Args:
        encoder: what gives the features.
        manifests: of the labelled images, with a held-out part; or two, the second held out.
        label: the column, field or suffix that holds the label.
        batch: images encoded at once.

    Raises:
        UserError: no held-out part, no such label, or one class only.
    """
    paths = _parts(manifests)
    found = [_encode(encoder, path, label, batch) for path in paths]
    names = sorted(Counter(found[0][1]))
    if len(names) < 2:
        raise UserError(f"{paths[0]}: '{label}' has the value {', '.join(names)} only; a probe needs two classes")
    if strange := sorted({name for name in found[1][1] if name not in names}):
        raise UserError(f"{paths[1]}: no image of {paths[0]} has the label '{strange[0]}'")
    index = {name: number for number, name in enumerate(names)}
    train, heldout = (Labelled(x, torch.tensor([index[name] for name in labels])) for x, labels in found)
    guesses = {"knn": neighbours(train, heldout.features), "linear": Probe(train)(heldout.features)}
    right = {name: float((guess == heldout.classes).float().mean()) for name, guess in guesses.items()}
    sizes = {"train": len(train.classes), "heldout": len(heldout.classes)}
    return {**right, **sizes, "classes": names, "width": encoder.width}


def _parts(manifests: Sequence[str]) -> list[str]:
    if len(manifests) > 1:
        return list(manifests)
    heldout = heldout_manifests(DataConfig(manifest=manifests[0]))
    if not heldout:
        raise UserError(f"{manifests[0]} has no held-out part; index it with --heldout 0.1, or name a second manifest")
    return [manifests[0], *heldout]


def _encode(encoder: Encoder, path: str, label: str, batch: int) -> tuple[Tensor, list[str]]:
    images, features, labels = LabelledImages(path, label, encoder.size), [], []
    for values, names in images.batches(batch):
        features.append(encoder.features(values))
        labels += names
    if not labels:
        raise UserError(
            f"{path}: no image has a label '{label}' (a text, or in Parquet a whole number): {images.bad[0]}"
        )
    if images.bad:
        warn(f"{path}: {len(images.bad)} of {len(images)} samples left out; the first: {images.bad[0]}")
    return torch.cat(features), labels


def neighbours(train: Labelled, features_MD: Tensor, count: int = NEIGHBOURS) -> Tensor:
    """Classes (M,) by the votes of the `count` nearest, each of weight exp(cosine similarity / temperature)."""
    known_ND = F.normalize(train.features, dim=1)
    classes, found = int(train.classes.max()) + 1, []
    for part_BD in F.normalize(features_MD, dim=1).split(_ROWS):
        nearest = (part_BD @ known_ND.T).topk(min(count, len(known_ND)), dim=1)
        votes_BC = torch.zeros(len(part_BD), classes)
        votes_BC.scatter_add_(1, train.classes[nearest.indices], (nearest.values / TEMPERATURE).exp())
        found.append(votes_BC.argmax(1))
    return torch.cat(found)


class Probe:
    """A logistic regression on standardised features: sum of cross-entropies + |weight|² / 2, at its one minimum."""

    def __init__(self, train: Labelled) -> None:
        features_ND = train.features.double()
        self._mean = features_ND.mean(0)
        self._deviation = features_ND.std(0).clamp(min=1e-6)
        x_ND, classes = self._standard(features_ND), int(train.classes.max()) + 1
        self.weight_CD = torch.zeros(classes, x_ND.shape[1], dtype=torch.float64, requires_grad=True)
        self.bias_C = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [self.weight_CD, self.bias_C], max_iter=_MOST, tolerance_grad=1e-7, history_size=20,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            optimiser.zero_grad()
            found = F.cross_entropy(x_ND @ self.weight_CD.T + self.bias_C, train.classes)
            found = found + self.weight_CD.square().sum() / (2 * len(x_ND))
            found.backward()  # type: ignore[no-untyped-call]
            return found

        optimiser.step(loss)  # type: ignore[no-untyped-call]

    def _standard(self, features: Tensor) -> Tensor:
        return (features.double() - self._mean) / self._deviation

    def __call__(self, features_MD: Tensor) -> Tensor:
        """Classes (M,)."""
        with torch.no_grad():
            return (self._standard(features_MD) @ self.weight_CD.T + self.bias_C).argmax(1)
