"""A convolutional codec of images or sounds as a model of transformers.

It is registered as `model.kind = "codec"` when `millrace.models.bridge` is imported; whoever loads an exported folder
imports it before. B rows, C channels, S sizes: (frames,), (hops,) or (height, width); L latents, D width of a latent.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init

from millrace.core.config import build
from millrace.models.bottleneck import Grid, Latent, build_bottleneck
from millrace.models.config import MelConfig
from millrace.models.convolutions import Decoder, Encoder, fit_to, pad_to_multiple, signal_of
from millrace.models.sound import LogMel

BOTTLENECKS = ("vq", "fsq", "kl", "none")


@strict
class CodecConfig(PretrainedConfig):
    """Sizes of a codec, and what it is of."""

    model_type = "codec"

    modality: str = "image"  # or audio
    mel: dict[str, Any] | None = None  # keys of MelConfig: sounds become mel bands; waveforms without it
    widths: list[int] = field(default_factory=lambda: [32, 64, 128])  # channels of each stage
    strides: list[int] = field(default_factory=lambda: [2, 2, 2])  # by which each stage makes its input shorter
    bottleneck: str = "vq"
    latent: int = 8  # width of a latent; with fsq, it has one number for each of the levels
    codes: int = 1024  # of vq
    levels: list[int] = field(default_factory=lambda: [8, 5, 5, 5])  # of fsq

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.modality not in ("image", "audio") or self.bottleneck not in BOTTLENECKS:
            raise ValueError(
                f"modality = '{self.modality}', bottleneck = '{self.bottleneck}': give image or audio, and one of "
                + ", ".join(BOTTLENECKS)
            )
        if len(self.widths) != len(self.strides) or not self.widths:
            raise ValueError(f"widths = {self.widths} and strides = {self.strides}: give one of each for every stage")
        if self.mel is not None and self.modality != "audio":
            raise ValueError("mel is for sounds; leave it out")
        if min(*self.widths, *self.strides, *self.levels, self.latent, self.codes) < 1:
            raise ValueError("widths, strides, levels, latent and codes must be at least 1")

    @property
    def dimensions(self) -> int:
        """Of the convolutions."""
        return 2 if self.modality == "image" else 1

    @property
    def stride(self) -> int:
        """Pixels, frames or hops that a latent stands for, on each side."""
        return math.prod(self.strides)

    def mels(self) -> MelConfig | None:
        """The bands that sounds become."""
        return None if self.mel is None else build(MelConfig, self.mel)

    @property
    def channels(self) -> int:
        """Colours, bands, or one."""
        mel = self.mels()
        return 3 if self.modality == "image" else mel.bands if mel else 1


class Coded(NamedTuple):
    """What training needs of a batch."""

    given: Tensor  # float32 (B, C, *S)
    made: Tensor  # its reconstruction, float32 (B, C, *S)
    latent: Tensor  # before the bottleneck, detached (B, L, D)
    cost_B: Tensor  # see `Latent`
    index_BL: Tensor | None


class Codec(PreTrainedModel):
    """Encoder, bottleneck, decoder."""

    config_class = CodecConfig
    config: CodecConfig
    main_input_name = "values"

    def __init__(self, config: CodecConfig) -> None:
        super().__init__(config)
        dimensions, channels, mel = config.dimensions, config.channels, config.mels()
        self.mel = LogMel(mel) if mel else None
        neck: Any = build_bottleneck(config.bottleneck, config.codes, config.latent, config.levels)
        self.bottleneck: Any = neck
        self.encoder = Encoder(dimensions, channels, config.widths, config.strides, neck.inputs)
        self.decoder = Decoder(dimensions, neck.width, config.widths, config.strides, channels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)  # torch's own
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, LogMel | Grid):  # transformers leaves what no file holds undefined
            for name, value in module.constants().items():
                init.copy_(getattr(module, name), value)
        else:
            super()._init_weights(module)

    # Of the weights, which are buffers where a codec is frozen (see `millrace.models.frozen`).
    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._weight().dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._weight().device

    def _weight(self) -> Tensor:
        first: Any = self.encoder[0]
        found: Tensor = first.weight
        return found

    @property
    def codes(self) -> int:
        """How many there are; 0 where latents are continuous."""
        return int(self.bottleneck.codes)

    def signal(self, values: Tensor) -> Tensor:
        """What is coded, float32 (B, C, *S), about -1 to 1: of images uint8 (B, height, width, 3) or sounds (B, F)."""
        return signal_of(values) if self.mel is None else self.mel(values) / 2 + 1

    def latents(self, signal: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Latent, list[int]]:
        """(before the bottleneck (B, L, D), after it, sizes of their grid), rows of the grid one after the other."""
        grid = self.encoder(pad_to_multiple(signal, self.config.stride).to(self.dtype))
        before = grid.flatten(2).transpose(1, 2)
        return before, self.bottleneck(before, noise), list(grid.shape[2:])

    def restored(self, latent_BLD: Tensor, sizes: list[int]) -> Tensor:
        """The signal of latents after the bottleneck, float32 (B, C, *S), S whole strides."""
        grid = latent_BLD.transpose(1, 2).unflatten(2, sizes)
        return self.decoder(grid.to(self.dtype)).float()

    def forward(self, values: Tensor, noise: Tensor | None = None) -> Coded:
        """Code and restore images uint8 (B, height, width, 3) or sounds float32 (B, F)."""
        given = self.signal(values)
        before, latent, sizes = self.latents(given, noise)
        made = fit_to(self.restored(latent.values_BLD, sizes), given.shape[2:])
        return Coded(given, made, before.detach(), latent.cost_B, latent.index_BL)

    @torch.no_grad()
    def encode(self, values: Tensor) -> Tensor:
        """Codes, int64 (B, *sizes of the grid), of images uint8 (B, height, width, 3) or sounds float32 (B, F).

        Raises:
            ValueError: latents of this codec are continuous.
        """
        _, latent, sizes = self.latents(self.signal(values))
        if latent.index_BL is None:
            raise ValueError(f"a codec with the bottleneck '{self.config.bottleneck}' has no codes; train vq or fsq")
        return latent.index_BL.unflatten(1, sizes)

    @torch.no_grad()
    def decode(self, index: Tensor) -> Tensor:
        """Images uint8 (B, height, width, 3), sounds (B, F) or bands (B, M, H), float32, of codes (B, *sizes).

        Sizes are whole strides: what was coded may have been shorter.
        """
        made = self.restored(self.bottleneck.look_up(index.flatten(1)), list(index.shape[1:]))
        if self.config.modality == "image":
            return ((made.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)
        return (made - 1) * 2 if self.mel is not None else made[:, 0]


AutoConfig.register("codec", CodecConfig)
AutoModel.register(CodecConfig, Codec)
