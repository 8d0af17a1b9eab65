"""Classification with few labels: FixMatch (Sohn et al., https://arxiv.org/abs/2001.07685, section 2 and algorithm 1).

A labelled sample's text is the name of its class, another's is empty. What the model that is being trained makes of a
sample's weak view is the label of its strong view, where it is sure: that model and not the mean of its weights, as in
the paper, for its weak views are computed anyway, and the mean lags behind it. What is evaluated is the mean.

The loss is the mean over the labelled samples of the global batch, and `weight` times that over those without a label.
The loop divides by all good samples, so sums of the one kind are multiplied by how many good samples there are for each
of that kind in the global batch, which does not depend on how rows are dealt.

B rows, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from millrace.core.errors import UserError, did_you_mean
from millrace.data.batch import IGNORED, SampleBatch
from millrace.engine.engines import Engines
from millrace.engine.teacher import Teacher
from millrace.models.towers import Classifier, build_encoder
from millrace.pretrain.objectives.base import MAIN, Figures, Loss, Objective, Setting, medium

WEAK, STRONG = "weak", "strong"  # names of views


@dataclass(frozen=True)
class Rows:
    """A micro-batch, and the class of each row (B,), `IGNORED` where it has none."""

    samples: SampleBatch
    labels_B: Tensor

    @property
    def good(self) -> list[bool]:
        """Which rows count."""
        return self.samples.good

    @property
    def labelled(self) -> int:
        """How many have a label."""
        return int((self.labels_B != IGNORED).sum())


class Logits(NamedTuple):
    """Of the views of each row, float32 (B, K); of strong ones where they are looked at."""

    weak_BK: Tensor
    strong_BK: Tensor | None = None


class Consistency(Objective):
    """Tell classes apart, and give two views of a sample the same."""

    of_text = False

    def __init__(self, module: ConsistencyModule, setting: Setting) -> None:
        super().__init__({MAIN: module})
        section = setting.objective
        self.figures = ("loss", "supervised", *(["unlabelled", "confident"] if section.weight else []), "accuracy")
        self.name, self.tokenizer = f"{section.encoder.kind} of {section.encoder.modality}", setting.tokenizer
        self._section, self._classes = section, _tokens_of(setting)

    @classmethod
    def check(cls, setting: Setting) -> None:
        section = setting.objective
        if setting.rows != "samples":
            raise UserError(f"objective.kind = 'consistency' needs data.rows = 'samples', not '{setting.rows}'")
        if len(_tokens_of(setting)) < 2 or len(_tokens_of(setting)) < len(section.classes):
            raise UserError(f"objective.classes = {section.classes}: give two classes or more, of different tokens")
        if section.encoder.modality == "text" or section.encoder.view:
            raise UserError(
                "objective.encoder: give modality = 'image' or 'audio' and no view; it is shown the views that are "
                f"named '{WEAK}' and '{STRONG}' in data.views"
            )

    @classmethod
    def fp32_weights(cls, config: Any) -> bool:
        return True  # in bf16 most of what moves the running mean would be rounded away

    @classmethod
    def build(cls, setting: Setting) -> Consistency:
        # Twice, for a partitioned module cannot be copied; both draw the same weights.
        made = [_classifier(setting) for _ in range(2)]
        return cls(ConsistencyModule(made[0], made[1], strong=setting.objective.weight > 0), setting)

    def view(self, micro: SampleBatch) -> Rows:
        """The rows with their classes; those without the views do not count."""
        if "tokens" not in micro.values:
            raise UserError("samples have no text, which would be the name of their class; index them with --text")
        micro = micro.where(WEAK, *([STRONG] if self._section.weight else []))
        counted = micro.lengths["tokens"] * torch.tensor(micro.good)
        ends = (counted - 1).clamp(min=0).tolist()  # without the [EOS] behind every text
        texts = [ids[:end] for ids, end in zip(micro.values["tokens"], ends, strict=True)]
        return Rows(micro, torch.tensor([self._class(ids) for ids in texts]))

    def _class(self, ids: Tensor) -> int:
        found = self._classes.get(tuple(ids.tolist()), IGNORED)
        if found == IGNORED and len(ids):
            assert self.tokenizer is not None
            text, names = self.tokenizer.decode(ids.tolist()), self._section.classes
            raise UserError(
                f"a sample's text is '{text}', which is none of objective.classes{did_you_mean(text, names)}; add it, "
                "or leave the text empty where there is no label"
            )
        return found

    def losses(self, views: Sequence[Rows], engines: Engines) -> Iterator[Loss]:
        mine = sum(view.labelled for view in views), sum(sum(view.good) for view in views)
        labelled, good = engines.world.sum(*mine)
        shares = good / max(labelled, 1), good / max(good - labelled, 1)
        for number, view in enumerate(views):
            figures = self._figures(engines.main.forward(view), view, shares)
            yield Loss(figures["loss"], {k: v.detach() for k, v in figures.items()}, number == len(views) - 1)

    def measure(self, view: Rows, engines: Engines) -> Figures:
        if view.labelled < sum(view.good):
            raise UserError("a held-out sample has no text, so no label to compare with; leave it out (data.heldout)")
        figures = self._figures(engines.main.forward(view), view, (1.0, 1.0), everything=True)
        return figures | {"loss": figures["supervised"]}

    def end_step(self, engines: Engines, *, taken: bool) -> None:
        module: ConsistencyModule = engines.main.module
        if taken:
            module.mean.follow(module.model, self._section.decay)

    def _figures(
        self, logits: Logits, view: Rows, shares: tuple[float, float], *, everything: bool = False
    ) -> dict[str, Tensor]:
        """Sums over labelled rows and over others, times the `shares` of each; with `everything` others are all."""
        labels_B = view.labels_B.to(logits.weak_BK.device)
        good_B = torch.tensor(view.good, device=labels_B.device)
        supervised = shares[0] * F.cross_entropy(logits.weak_BK, labels_B, reduction="sum", ignore_index=IGNORED)
        right = shares[0] * (logits.weak_BK.argmax(1) == labels_B).sum()
        found = {"loss": supervised, "supervised": supervised, "accuracy": right}
        if logits.strong_BK is None:
            return found
        top_B, guess_B = logits.weak_BK.detach().softmax(1).max(1)
        sure_B = (top_B >= self._section.threshold) & good_B & (everything | (labels_B == IGNORED))
        each_B = F.cross_entropy(logits.strong_BK, guess_B, reduction="none")
        unlabelled = shares[1] * (each_B * sure_B).sum()
        found |= {"unlabelled": unlabelled, "confident": shares[1] * sure_B.sum()}
        return found | {"loss": supervised + self._section.weight * unlabelled}


class ConsistencyModule(nn.Module):
    """A classifier, and the running mean of its weights."""

    def __init__(self, model: Classifier, mean: Classifier, *, strong: bool) -> None:
        super().__init__()
        self.model, self.mean = model, Teacher(mean)
        self._names = (WEAK, STRONG) if strong else (WEAK,)

    def inputs(self, view: Rows, device: torch.device) -> dict[str, Tensor]:
        """The arguments of `forward`."""
        return {name: medium(view.samples, name).to(device, non_blocking=True) for name in self._names}

    def forward(self, weak: Tensor, strong: Tensor | None = None) -> Logits:
        """Views of each row as `Classifier.forward` takes them; out of training the mean of the weights looks."""
        model = self.model if self.training else self.mean
        if strong is None:
            return Logits(model(weak))
        both: Any = model(torch.cat([weak, strong]))
        return Logits(*both.chunk(2))


def _classifier(setting: Setting) -> Classifier:
    config, classes = setting.objective.encoder, len(setting.objective.classes)
    encoder = build_encoder(config, setting.tokenizer.vocab_size, setting.seed, setting.zero3)
    return Classifier(config, encoder, classes, setting.seed)


def _tokens_of(setting: Setting) -> dict[tuple[int, ...], int]:
    """Number of a class by the tokens of its name."""
    names = setting.objective.classes
    return {tuple(ids.tolist()): number for number, ids in enumerate(setting.tokenizer.encode(names))}
