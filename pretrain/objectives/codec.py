"""Codecs of images and sounds: VQ-VAE, VQGAN, FSQ and variational autoencoders, by the model's bottleneck.

B rows, C channels, S sizes, L latents of a row, D width of a latent; see `millrace.models.codec`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from millrace.core.errors import UserError
from millrace.engine.engines import Engines
from millrace.models.bottleneck import Codebook, Normal
from millrace.models.bridge import build_sized
from millrace.models.codec import Codec, CodecConfig, Coded
from millrace.models.convolutions import mean_by_row, seeded_noise
from millrace.models.sound import spectral_distance
from millrace.pretrain.objectives.adversarial import NAME, Adversary, Balance
from millrace.pretrain.objectives.base import MAIN, Figures, Loss, Objective, Setting, gathered, medium, model_files

_LAST = 2**63 - 1
_CANDIDATES = 4  # latents of each row that may replace dead codes


class CodecObjective(Objective):
    """Restore what was coded."""

    of_text = False

    def __init__(self, model: Codec, adversary: Adversary | None, setting: Setting) -> None:
        module, section = CodecModule(model, setting.objective.view), setting.objective
        super().__init__({MAIN: module}, {NAME: section.adversary.lr})
        self.figures = ("loss", "reconstruction", *(["bottleneck"] if model.config.bottleneck in ("vq", "kl") else []))
        if adversary is not None:
            self.modules[NAME] = adversary.module
            self.figures += (NAME, "opinion", "matching")
        self.name = f"{model.config.bottleneck} codec of {model.config.modality}"
        self._section, self._adversary, self._model = section, adversary, model
        self._seen = module.view  # other samples do not count
        self._counted: Tensor | None = None
        self._candidates: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def check(cls, setting: Setting) -> None:
        if setting.rows != "samples":
            raise UserError(f"objective.kind = 'codec' needs data.rows = 'samples', not '{setting.rows}'")
        if setting.model.kind != "codec" and setting.model.init == "random":
            raise UserError(f"objective.kind = 'codec' trains model.kind = 'codec', not '{setting.model.kind}'")

    @classmethod
    def build(cls, setting: Setting) -> CodecObjective:
        model = build_sized(setting.model, CodecConfig, setting.seed, setting.zero3)
        config, wanted = model.config, setting.objective.adversary
        adversary = Adversary(wanted, (config.dimensions, config.channels), setting.seed) if wanted.weight else None
        return cls(model, adversary, setting)

    def view(self, micro: Any) -> Any:
        return micro.where(self._seen)

    def losses(self, views: Sequence[Any], engines: Engines) -> Iterator[Loss]:
        module: CodecModule = engines.main.module
        self._counted, self._candidates = None, []
        if self._adversary is not None:
            self._adversary.begin(engines)
        for number, view in enumerate(views):
            last = number == len(views) - 1
            good_B = torch.tensor(view.good, device=engines.world.device).float()
            coded: Coded = Coded(*engines.main.forward(view))
            leaf = coded.made.detach().requires_grad_()
            each_B = self._distance(coded.given, leaf, module.model)
            (gradient,) = torch.autograd.grad((each_B * good_B).sum(), leaf)
            figures = self._figures(each_B.detach(), coded.cost_B.detach(), good_B)
            if self._adversary is not None:
                pull = self._adversary.pull(coded.given, coded.made, good_B, gradient, module.balance)
                gradient = gradient + pull.gradient
                figures |= {"opinion": pull.opinion, "matching": pull.matching}
            value = (coded.made * gradient).sum() + self._section.weight * (coded.cost_B * good_B).sum()
            self._count(module.model.bottleneck, coded, view)
            yield Loss(value, figures, last)
            if self._adversary is not None:
                value, judged = self._adversary.judge((coded.given, coded.made), view, engines)
                yield Loss(value, {NAME: judged}, last, NAME)

    def measure(self, view: Any, engines: Engines) -> Figures:
        coded = Coded(*engines.main.forward(view))
        each_B = self._distance(coded.given, coded.made, engines.main.module.model)
        good_B = torch.tensor(view.good, device=engines.world.device).float()
        return self._figures(each_B, coded.cost_B, good_B)

    def _distance(self, given: Tensor, made: Tensor, model: Codec) -> Tensor:
        """Mean absolute difference of each row (B,), and that of spectra where the signal is a waveform."""
        found = mean_by_row((made - given).abs())
        if model.config.modality == "audio" and model.mel is None and self._section.spectra:
            found = found + self._section.spectra * spectral_distance(given[:, 0], made[:, 0])
        return found

    def _figures(self, each_B: Tensor, cost_B: Tensor, good_B: Tensor) -> dict[str, Tensor]:
        restored, cost = (each_B * good_B).sum(), (cost_B * good_B).sum()
        found = {"loss": restored + self._section.weight * cost, "reconstruction": restored, "bottleneck": cost}
        return {name: value for name, value in found.items() if name in self.figures}

    def _count(self, bottleneck: nn.Module, coded: Coded, view: Any) -> None:
        """What the codebook learns from a micro-batch at the step's end."""
        if not isinstance(bottleneck, Codebook) or coded.index_BL is None:
            return
        good = [row for row, good in enumerate(view.good) if good]  # known here: no host read
        counted = bottleneck.count(coded.latent[good], coded.index_BL[good])
        self._counted = counted if self._counted is None else self._counted + counted
        length = coded.latent.shape[1]
        places = [np.random.default_rng(seed).integers(0, length, _CANDIDATES) for seed in view.seeds]
        chosen = torch.from_numpy(np.stack(places)).to(coded.latent.device)
        vectors = coded.latent.gather(1, chosen[:, :, None].expand(-1, -1, coded.latent.shape[2]))
        # In the order of the rows' seeds, alike however rows are dealt to ranks; bad rows come last.
        keys = np.where(view.good, view.seeds >> np.uint64(1), np.uint64(_LAST)).astype(np.int64)
        self._candidates.append((vectors, torch.from_numpy(keys).to(coded.latent.device)))

    def end_step(self, engines: Engines, *, taken: bool) -> None:
        module: CodecModule = engines.main.module
        counted, self._counted = self._counted, None
        if self._adversary is not None:
            self._adversary.end_step(module.balance, taken=taken)
        if counted is None or not taken:
            return
        if dist.is_initialized():
            dist.all_reduce(counted)
        vectors, keys = (gathered(torch.cat(parts)) for parts in zip(*self._candidates, strict=True))
        valid = _CANDIDATES * (keys != _LAST).sum()
        candidates = vectors[torch.argsort(keys)].flatten(0, 1)
        module.model.bottleneck.follow(counted, candidates, valid, self._section.decay)

    def files(self) -> dict[str, str]:
        return model_files(self._model)


class CodecModule(nn.Module):
    """A codec, and what is beside it in a checkpoint."""

    def __init__(self, model: Codec, view: str) -> None:
        super().__init__()
        self.model, self.balance = model, Balance()
        self.view = view or model.config.modality

    def inputs(self, view: Any, device: torch.device) -> dict[str, Any]:
        """The arguments of `forward` from a `SampleBatch`."""
        values = medium(view, self.view)
        found = {"values": values.to(device, non_blocking=True)}
        if self.training and isinstance(self.model.bottleneck, Normal):
            grid = [-(-size // self.model.config.stride) for size in self._sizes(values)]
            shape = (int(np.prod(grid)), self.model.bottleneck.width)
            found["noise"] = seeded_noise(view.seeds, shape, device)
        return found

    def _sizes(self, values: Tensor) -> list[int]:
        """Of the signal, without its channels."""
        if self.model.config.modality == "image":
            return list(values.shape[1:3])
        mel = self.model.config.mels()
        return [mel.hops(values.shape[1]) if mel else values.shape[1]]

    def forward(self, values: Tensor, noise: Tensor | None = None) -> Coded:
        """As the codec's."""
        found: Coded = self.model(values, noise)
        return found
