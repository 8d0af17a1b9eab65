"""Generative adversarial networks (Goodfellow et al., https://arxiv.org/abs/1406.2661) from noise, and words.

What is judged beside the loss is what the running mean of the generator's weights makes (Yazıcı et al.,
https://arxiv.org/abs/1806.04498). B rows, T tokens, C channels, S sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from millrace.core.errors import UserError
from millrace.engine.engines import Engines
from millrace.engine.teacher import follow
from millrace.models.bridge import build_sized
from millrace.models.conditioning import seen_tokens
from millrace.models.convolutions import seeded_noise, signal_of
from millrace.models.generator import Generator, GeneratorConfig
from millrace.pretrain.objectives.adversarial import NAME, Adversary
from millrace.pretrain.objectives.base import MAIN, Figures, Loss, Objective, Setting, medium, model_files


class Gan(Objective):
    """Make what an adversary takes for real."""

    figures = ("loss", NAME)
    of_text = False

    def __init__(self, module: GanModule, adversary: Adversary, setting: Setting) -> None:
        section, config = setting.objective, module.model.config
        super().__init__({MAIN: module, NAME: adversary.module}, {NAME: section.adversary.lr})
        self.name = f"generator of {config.modality}" + (" from words" if config.words else "")
        self.tokenizer = setting.tokenizer if config.words else None
        self._adversary, self._model, self._decay = adversary, module.model, section.decay
        self._seen = [module.view, *(["tokens"] if config.words else [])]  # samples without them do not count

    @classmethod
    def check(cls, setting: Setting) -> None:
        if setting.rows != "samples":
            raise UserError(f"objective.kind = 'gan' needs data.rows = 'samples', not '{setting.rows}'")
        if setting.model.kind != "generator" and setting.model.init == "random":
            raise UserError(f"objective.kind = 'gan' trains model.kind = 'generator', not '{setting.model.kind}'")

    @classmethod
    def build(cls, setting: Setting) -> Gan:
        model = setting.model
        if model.config.get("words") and model.init == "random":
            vocabulary = {"vocab_size": setting.tokenizer.vocab_size}
            model = dataclasses.replace(model, config=vocabulary | model.config)
        # Twice, for a partitioned module cannot be copied; both draw the same weights.
        made: list[Generator] = [build_sized(model, GeneratorConfig, setting.seed, setting.zero3) for _ in range(2)]
        config = made[0].config
        words = (config.vocab_size, config.words) if config.words else None
        adversary = Adversary(setting.objective.adversary, (config.dimensions, config.channels), setting.seed, words)
        return cls(GanModule(made[0], made[1], setting.objective.view), adversary, setting)

    def view(self, micro: Any) -> Any:
        return micro.where(*self._seen)

    def losses(self, views: Sequence[Any], engines: Engines) -> Iterator[Loss]:
        self._adversary.begin(engines)
        for number, view in enumerate(views):
            last = number == len(views) - 1
            good_B, real, words = self._given(view, engines)
            made = engines.main.forward(view)
            check_size(real, made)
            fooled = self._adversary.opinion(made, good_B, words)
            yield Loss(fooled, {"loss": fooled.detach()}, last)
            value, judged = self._adversary.judge((real, made), view, engines, words)
            yield Loss(value, {NAME: judged}, last, NAME)

    def measure(self, view: Any, engines: Engines) -> Figures:
        self._adversary.begin(engines)
        good_B, real, words = self._given(view, engines)
        made = engines.main.forward(view)
        opinion = self._adversary.opinion(made, good_B, words)
        return {"loss": opinion, NAME: self._adversary.judge((real, made), view, engines, words)[1]}

    def _given(self, view: Any, engines: Engines) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(which rows are good, what is real, tokens and their mask)."""
        module: GanModule = engines.main.module
        device = engines.world.device
        given = module.inputs(view, device)
        words = [given["tokens_BT"], given["mask_BT"]] if "tokens_BT" in given else []
        return torch.tensor(view.good, device=device).float(), signal_of(module.real(view).to(device)), words

    def end_step(self, engines: Engines, *, taken: bool) -> None:
        module: GanModule = engines.main.module
        if taken:
            module.follow(self._decay)

    def files(self) -> dict[str, str]:
        return model_files(self._model)


class GanModule(nn.Module):
    """A generator, and the running mean of its weights under the name that is exported."""

    steps: Tensor

    def __init__(self, maker: Generator, mean: Generator, view: str) -> None:
        super().__init__()
        self.maker, self.model = maker, mean.requires_grad_(False)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))
        self.view = view or mean.config.modality

    def follow(self, decay: float) -> None:
        """After a step: the mean moves, at first faster, so that the random first weights are soon no part of it.

        By min(`decay`, (1 + steps) / (10 + steps)), as TensorFlow's ExponentialMovingAverage does.
        """
        self.steps += 1
        early = (1 + self.steps) / (10 + self.steps)
        follow(self.model, self.maker, early.clamp(max=decay))

    def real(self, view: Any) -> Tensor:
        """Images uint8 (B, height, width, 3) or sounds (B, F) of a `SampleBatch`."""
        return medium(view, self.view)

    def inputs(self, view: Any, device: torch.device) -> dict[str, Any]:
        """The arguments of `forward` from a `SampleBatch`."""
        found = {"noise_BN": seeded_noise(view.seeds, (self.model.config.noise,), device)}
        if self.model.config.words:
            if "tokens" not in view.values:
                raise UserError("model.config.words: samples have no text; index them with --text, or leave it out")
            tokens_BT = view.values["tokens"].to(device, non_blocking=True)
            found |= {"tokens_BT": tokens_BT, "mask_BT": seen_tokens(tokens_BT, view.lengths["tokens"].to(device))}
        return found

    def forward(self, noise_BN: Tensor, **words: Tensor) -> Tensor:
        """What the generator makes (B, C, *S); out of training, what its mean makes."""
        made: Tensor = (self.maker if self.training else self.model)(noise_BN, **words)
        return made


def check_size(real: Tensor, made: Tensor) -> None:
    """Refuse a generator whose signals are of another size than the samples."""
    if real.shape != made.shape:
        sizes = [" x ".join(map(str, signal.shape[1:])) for signal in (real, made)]
        raise UserError(
            f"samples are {sizes[0]} and the generator makes {sizes[1]} (channels, then sizes): mend the view in "
            "data.views, or grid and strides in model.config"
        )
