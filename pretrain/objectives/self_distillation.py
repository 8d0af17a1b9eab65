"""Self-distillation without labels: DINO (Caron et al., https://arxiv.org/abs/2104.14294, algorithm 1).

A student that sees all views of a picture shall say what its teacher, the running mean of its weights, says of another
large view of it. The teacher's outputs are centred by their running mean, and sharpened, so that neither one output nor
all alike is a way out. L large and S small views, V = L + S; B pictures, K outputs, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from millrace.core.errors import UserError
from millrace.engine.engines import Engines
from millrace.engine.teacher import follow
from millrace.models.config import TowerConfig
from millrace.models.initial import module_seed
from millrace.models.towers import build_encoder
from millrace.models.vision import mean_state, pictures, width_of
from millrace.pretrain.objectives.base import MAIN, Figures, Loss, Objective, Setting, medium, model_files
from millrace.pretrain.objectives.config import SelfDistillationConfig


class SelfDistillation(Objective):
    """Agree with one's own running mean. What is exported and judged is the teacher, as in the paper."""

    figures = ("loss", "entropy")
    of_text = False

    def __init__(self, module: SelfDistillationModule, setting: Setting) -> None:
        super().__init__({MAIN: module})
        self.name = f"{setting.model.kind} that is its own teacher"
        self._section: SelfDistillationConfig = setting.objective
        self._model = module.model
        self._seen: Tensor | None = None  # of this step: sums of the teacher's outputs, and how many, (K + 1,)

    @classmethod
    def check(cls, setting: Setting) -> None:
        if setting.rows != "samples":
            raise UserError(f"objective.kind = 'self_distillation' needs data.rows = 'samples', not '{setting.rows}'")
        if setting.model.init != "random" or setting.model.depth is not None:
            raise UserError(
                "objective.kind = 'self_distillation' begins with random weights (model.init = 'random') of an encoder "
                "whose sizes stand in [model.config]; leave model.depth out"
            )

    @classmethod
    def build(cls, setting: Setting) -> SelfDistillation:
        config = TowerConfig(modality="image", kind=setting.model.kind, config=setting.model.config)
        # Several times, for a partitioned module cannot be copied; all draw the same weights.
        encoders = [build_encoder(config, 0, setting.seed, setting.zero3) for _ in range(3)]
        heads = [Head(width_of(encoders[0].config), setting.objective, setting.seed) for _ in range(3)]
        return cls(SelfDistillationModule(encoders, heads, setting.objective), setting)

    def view(self, micro: Any) -> Any:
        names = (name for kind in (self._section.large, self._section.small) for name in _names(micro, kind))
        return micro.where(*names)  # other samples do not count

    def losses(self, views: Sequence[Any], engines: Engines) -> Iterator[Loss]:
        self._seen = None
        for number, view in enumerate(views):
            value, found, seen = engines.main.forward(view)
            self._seen = seen if self._seen is None else self._seen + seen
            yield Loss(value, self.named(found), number == len(views) - 1)

    def measure(self, view: Any, engines: Engines) -> Figures:
        return self.named(engines.main.forward(view)[1])

    @torch.no_grad()
    def end_step(self, engines: Engines, *, taken: bool) -> None:
        module: SelfDistillationModule = engines.main.module
        seen, self._seen = self._seen, None
        if not taken or seen is None:
            return
        if dist.is_initialized():
            dist.all_reduce(seen)
        mean = (seen[:-1] / seen[-1].clamp(min=1)).float()
        module.centre.lerp_(mean, 1 - self._section.centre)
        follow(module.model, module.student, self._section.decay, module.rest[0])
        follow(module.aim, module.projection, self._section.decay, module.rest[1])

    def files(self) -> dict[str, str]:
        return model_files(self._model)


class Head(nn.Module):
    """Three layers, length 1, and a last layer whose rows have length 1 (weight norm with its gain held at 1)."""

    def __init__(self, width: int, section: SelfDistillationConfig, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(module_seed(seed, "projection"))
            self.layers = nn.Sequential(
                nn.Linear(width, section.hidden),
                nn.GELU(),
                nn.Linear(section.hidden, section.hidden),
                nn.GELU(),
                nn.Linear(section.hidden, section.bottleneck),
            )
            self.last = Directions(section.bottleneck, section.outputs)

    def forward(self, states_BD: Tensor) -> Tensor:
        """Outputs (B, K) in float32, cosines."""
        found: Tensor = self.last(self.layers(states_BD))
        return found


class Directions(nn.Module):
    """Cosines between vectors and directions that are learned."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width) * width**-0.5)

    def forward(self, values: Tensor) -> Tensor:
        """(B, width) to (B, count), in float32 whatever the weights are kept in."""
        return F.linear(F.normalize(values.float(), dim=-1), F.normalize(self.weight.float(), dim=-1))


class SelfDistillationModule(nn.Module):
    """Student and teacher, each an encoder and a head, what the teacher keeps beside its weights, and the centre."""

    centre: Tensor

    def __init__(self, encoders: Sequence[Any], heads: Sequence[Head], section: SelfDistillationConfig) -> None:
        super().__init__()
        self.student, self.projection = encoders[0], heads[0]
        self.model, self.aim = encoders[1].requires_grad_(False), heads[1].requires_grad_(False)
        self.rest = nn.ModuleList([encoders[2], heads[2]]).requires_grad_(False)
        with torch.no_grad():
            for parameter in self.rest.parameters():
                getattr(parameter, "ds_tensor", parameter).zero_()
        self._section = section
        self.register_buffer("centre", torch.zeros(section.outputs))

    def inputs(self, view: Any, device: torch.device) -> dict[str, Tensor]:
        """The arguments of `forward` from a `SampleBatch`."""
        kinds = (self._section.large, self._section.small)
        large, small = ([medium(view, name) for name in _names(view, kind)] for kind in kinds)
        if not large or len(large) + len(small) < 2:
            raise UserError(
                f"samples have the views {', '.join(view.values)}; name in data.views two or more of a picture: "
                f"{{role = 'image', name = '{self._section.large}', count = 2, size = …, scale = [0.4, 1.0]}}"
            )
        found = {"large": torch.stack(large), "good_B": torch.tensor(view.good).float()}
        if small:
            found["small"] = torch.stack(small)
        return {name: value.to(device, non_blocking=True) for name, value in found.items()}

    def forward(self, large: Tensor, good_B: Tensor, small: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Views uint8 (L, B, height, width, 3) and (S, B, …).

        Returns:
            (loss summed over good pictures, float32; [loss, the teacher's entropy in nats], detached; sums of the
            teacher's outputs over good pictures' large views, and their number, float64 (K + 1,)).
        """
        parts = [large] if small is None else [large, small]
        said_VBK = torch.cat([_outputs(self.student, self.projection, part) for part in parts])
        with torch.no_grad():
            wanted_LBK = _outputs(self.model, self.aim, large)
            aims_LBK = F.softmax((wanted_LBK - self.centre) / self._section.sharpness, dim=-1)
            entropy_B = torch.special.entr(aims_LBK).sum(-1).mean(0)
            flat, weights = wanted_LBK.double().flatten(0, 1), good_B.double().repeat(len(large))
            seen = torch.cat([weights @ flat, weights.sum()[None]])
        logs_VBK = F.log_softmax(said_VBK / self._section.temperature, dim=-1)
        each_LVB = -torch.einsum("lbk,vbk->lvb", aims_LBK, logs_VBK)
        others_LV = 1 - torch.eye(len(aims_LBK), len(logs_VBK), device=each_LVB.device)  # not of the same view
        each_B = (each_LVB * others_LV[:, :, None]).sum((0, 1)) / others_LV.sum()
        loss = (each_B * good_B).sum()
        return loss, torch.stack([loss.detach(), (entropy_B * good_B).sum()]), seen


def _names(view: Any, kind: str) -> list[str]:
    """Of the views of one kind, alone or counted."""
    found = [name for name in view.values if name == kind or name.removeprefix(kind).isdigit()]
    return sorted(found, key=lambda name: (len(name), name))


def _outputs(encoder: Any, head: nn.Module, views: Tensor) -> Tensor:
    """Outputs (V, B, K) of views uint8 (V, B, height, width, 3)."""
    states = mean_state(encoder, pictures(views.flatten(0, 1), encoder.dtype))
    found: Tensor = head(states).unflatten(0, views.shape[:2])
    return found
