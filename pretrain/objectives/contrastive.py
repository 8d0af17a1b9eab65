"""Contrastive learning between modalities, with a batch that is one whatever ranks and accumulation it is dealt to.

Softmax: CLIP (https://arxiv.org/abs/2103.00020); sigmoid: SigLIP (https://arxiv.org/abs/2303.15343). A batch in several
micro-batches is encoded twice, as in GradCache (https://arxiv.org/abs/2101.06983): first for the features of all
samples of all ranks, from which the loss and its gradient with respect to every feature follow, then to carry that
gradient into the weights. N samples of the global batch, n of this rank, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from millrace.core.errors import UserError
from millrace.engine.engines import Engines
from millrace.models.towers import Tower, build_encoder
from millrace.pretrain.objectives.base import MAIN, Figures, Loss, Objective, Setting, gathered, model_files

_ROWS = 1024  # of the matrix of similarities that are held at once
Features = dict[str, Tensor]


class Contrastive(Objective):
    """Samples of a pair are near each other, and far from all others."""

    figures = ("loss", "accuracy")
    of_text = False

    def __init__(self, module: Towers, setting: Setting) -> None:
        super().__init__({MAIN: module})
        self._sigmoid, towers = setting.objective.loss == "sigmoid", setting.objective.built()
        self.name = " and ".join(f"{tower.kind} of {tower.name}" for tower in towers)
        self._seen = [tower.name for tower in towers]  # samples without one of them do not count
        self.tokenizer = setting.tokenizer if any(tower.modality == "text" for tower in towers) else None

    @classmethod
    def check(cls, setting: Setting) -> None:
        if setting.rows != "samples":
            raise UserError(f"objective.kind = 'contrastive' needs data.rows = 'samples', not '{setting.rows}'")
        if len(setting.objective.towers) < 2:
            raise UserError("objective.towers: name the encoders of two modalities, or of more")

    @classmethod
    def build(cls, setting: Setting) -> Contrastive:
        section = setting.objective
        towers = {}
        for config in section.built():
            encoder = build_encoder(config, setting.tokenizer.vocab_size, setting.seed, setting.zero3)
            towers[config.name] = Tower(config, encoder, section.width, setting.seed)
        return cls(Towers(towers, section.scale, section.bias), setting)

    def view(self, micro: Any) -> Any:
        return micro.where(*self._seen)

    def losses(self, views: Sequence[Any], engines: Engines) -> Iterator[Loss]:
        module, world = engines.main.module, engines.world
        good = torch.cat([torch.tensor(view.good) for view in views]).to(world.device)
        sizes = [len(view.good) for view in views]
        if len(views) == 1:
            encoded = [engines.main.forward(views[0])]
        else:
            with torch.no_grad():
                encoded = [engines.main.forward(view) for view in views]
        names = list(module.towers)
        mine = {name: torch.cat([features[name].detach() for features, _ in encoded]) for name in names}
        rows = range(world.rank * len(good), (world.rank + 1) * len(good))
        everything = {name: gathered(features) for name, features in mine.items()}
        temperature = encoded[0][1].detach()
        found = self._gradients(everything, gathered(good), rows, temperature)
        start = 0
        for number, (view, size) in enumerate(zip(views, sizes, strict=True)):
            features, values = encoded[0] if len(views) == 1 else engines.main.forward(view)
            part = slice(start, start + size)
            carried = sum((features[name] * found.features[name][part]).sum() for name in names)
            carried = carried + (values * found.temperature).sum() / len(views)
            start += size
            last = number == len(views) - 1
            yield Loss(carried, found.figures if last else {}, last)

    def measure(self, view: Any, engines: Engines) -> Figures:
        features, temperature = engines.main.forward(view)
        good = torch.tensor(view.good, device=engines.world.device)
        with torch.enable_grad():
            return self._gradients(features, good, range(len(good)), temperature, alone=True).figures

    def files(self) -> dict[str, str]:
        towers: Any = self.modules[MAIN].towers
        found = {name: model_files(tower.encoder)["model/config.json"] for name, tower in towers.items()}
        return {f"towers/{name}/config.json": text for name, text in found.items()}

    def _gradients(
        self, features: Features, good_N: Tensor, rows: range, temperature: Tensor, *, alone: bool = False
    ) -> Gradients:
        """Of the loss of all ranks, with respect to the features of this rank's `rows`; of the rest its own share."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in features.items()}
        values = temperature.detach().requires_grad_()
        sums = torch.zeros(2, dtype=torch.float64, device=values.device)
        totals = {name: torch.zeros_like(tensor) for name, tensor in leaves.items()}
        slope = torch.zeros_like(values)
        pairs = list(combinations(leaves, 2))
        ways = pairs if self._sigmoid else [*pairs, *((b, a) for a, b in pairs)]
        for a, b in ways:
            share = 1 / len(ways)
            for first in range(rows.start, rows.stop, _ROWS):
                chosen = torch.arange(first, min(first + _ROWS, rows.stop), device=good_N.device)
                loss, right = self._rows(leaves[a], leaves[b], good_N, chosen, values)
                grads = torch.autograd.grad(loss * share, [leaves[a], leaves[b], values])
                totals[a] += grads[0]
                totals[b] += grads[1]
                slope += grads[2]
                sums += share * torch.stack([loss.detach(), right]).double()
        if not alone and dist.get_world_size() > 1:
            for total in totals.values():
                dist.all_reduce(total)
        part = slice(rows.start, rows.stop)
        return Gradients({n: t[part] for n, t in totals.items()}, slope, {"loss": sums[0], "accuracy": sums[1]})

    def _rows(
        self, a_NW: Tensor, b_NW: Tensor, good_N: Tensor, chosen_n: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(summed loss, right pairs) of some samples of `a` against all of `b`."""
        logits_nN = a_NW[chosen_n] @ b_NW.T * values[0].exp() + values[1]
        good_n = good_N[chosen_n]
        right = ((logits_nN.masked_fill(~good_N, -torch.inf).argmax(1) == chosen_n) & good_n).sum()
        if self._sigmoid:
            signs = torch.full_like(logits_nN, -1.0).scatter_(1, chosen_n[:, None], 1.0)
            each = -F.logsigmoid(signs * logits_nN) * (good_n[:, None] & good_N)
            return each.sum(), right.float()
        masked = logits_nN.masked_fill(~good_N, -torch.inf)
        each = F.cross_entropy(masked.masked_fill(~good_n[:, None], 0.0), chosen_n, reduction="none")
        return (each * good_n).sum(), right.float()


class Gradients:
    """Of the loss with respect to features (n, W) by tower and to [log scale, bias], and the figures of the rows."""

    def __init__(self, features: Features, temperature: Tensor, figures: Mapping[str, Tensor]) -> None:
        self.features, self.temperature, self.figures = features, temperature, figures


class Towers(nn.Module):
    """Several towers, and what their similarities are multiplied by and shifted by."""

    def __init__(self, towers: Mapping[str, Tower], scale: float, bias: float) -> None:
        super().__init__()
        self.towers = nn.ModuleDict(towers)
        # [log scale], [bias]: DeepSpeed cannot partition a number without a dimension
        self.log_scale = nn.Parameter(torch.tensor([scale]).log())
        self.bias = nn.Parameter(torch.tensor([bias]))

    def inputs(self, view: Any, device: torch.device) -> dict[str, Any]:
        """The arguments of `forward` from a `SampleBatch`."""
        found = {}
        for name in self.towers:
            if name not in view.values:
                held = ", ".join(view.values)
                raise UserError(f"objective.towers: samples have no '{name}'; they have {held} (see data.views)")
            tower: Any = self.towers[name]
            found[name] = tower.inputs(view.values[name], view.lengths.get(name), device)
        return {"samples": found}

    def forward(self, samples: dict[str, dict[str, Tensor]]) -> tuple[Features, Tensor]:
        """(features by tower, float32 (B, W) of length 1; [log scale, bias], float32)."""
        features = {name: self.towers[name](**values) for name, values in samples.items()}
        return features, torch.cat([self.log_scale, self.bias]).float()
