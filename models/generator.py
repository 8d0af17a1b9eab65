"""A convolutional generator of images or sounds from noise and words, as a model of transformers.

It is registered as `model.kind = "generator"` when `millrace.models.bridge` is imported; whoever loads an exported
folder imports it before. B rows, N width of the noise, T tokens, E width of the words, C channels, S sizes.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers import initialization as init

from millrace.models.conditioning import Words
from millrace.models.convolutions import Decoder


@strict
class GeneratorConfig(PretrainedConfig):
    """Sizes of a generator, and what it makes."""

    model_type = "generator"

    modality: str = "image"  # or audio, a waveform
    grid: int = 4  # latents on each side, from which the stages enlarge
    widths: list[int] = field(default_factory=lambda: [32, 64, 128])  # channels of each stage, the finest first
    strides: list[int] = field(default_factory=lambda: [2, 2, 2])  # by which each stage enlarges
    noise: int = 64
    words: int = 0  # width of the words that it is told; 0: none
    vocab_size: int = 0  # of these words; the tokenizer's if 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.modality not in ("image", "audio"):
            raise ValueError(f"modality = '{self.modality}': give image or audio")
        if len(self.widths) != len(self.strides) or not self.widths:
            raise ValueError(f"widths = {self.widths} and strides = {self.strides}: give one of each for every stage")
        if min(*self.widths, *self.strides, self.grid, self.noise) < 1 or min(self.words, self.vocab_size) < 0:
            raise ValueError("widths, strides, grid and noise must be at least 1, words and vocab_size not negative")

    @property
    def dimensions(self) -> int:
        """Of the convolutions."""
        return 2 if self.modality == "image" else 1

    @property
    def channels(self) -> int:
        """Colours, or one."""
        return 3 if self.modality == "image" else 1


class Generator(PreTrainedModel):
    """Noise and words onto a grid, and a decoder."""

    config_class = GeneratorConfig
    config: GeneratorConfig
    main_input_name = "noise_BN"

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        self.words = Words(config.vocab_size, config.words) if config.words else None
        width = config.widths[-1]
        self.start = nn.Linear(config.noise + config.words, width * config.grid**config.dimensions)
        self.decoder = Decoder(config.dimensions, width, config.widths, config.strides, config.channels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)  # torch's own
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        else:
            super()._init_weights(module)

    def forward(self, noise_BN: Tensor, tokens_BT: Tensor | None = None, mask_BT: Tensor | None = None) -> Tensor:
        """Signals float32 (B, C, *S) in -1 to 1."""
        told = noise_BN.to(self.dtype)
        if self.words is not None:
            assert tokens_BT is not None and mask_BT is not None
            told = torch.cat([told, self.words(tokens_BT, mask_BT)], 1)
        grid = self.start(told).unflatten(1, (-1, *[self.config.grid] * self.config.dimensions))
        return self.decoder(grid).float().tanh()


AutoConfig.register("generator", GeneratorConfig)
AutoModel.register(GeneratorConfig, Generator)
