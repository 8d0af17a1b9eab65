"""Encoders of images of transformers: what they are given, what is taken of them, and what has to be mended in them.

B images, C channels, T positions, D hidden.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForPreTraining, PretrainedConfig, PreTrainedModel, ViTMAEConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from millrace.core.errors import UserError
from millrace.models.bridge import build_sized
from millrace.models.config import ModelConfig
from millrace.models.initial import module_seed, whole

_GROUPS = 32  # of a group norm, as its authors have it; groups of less than four channels are no norm
_NARROWEST = 4


def pictures(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images uint8 (B, height, width, 3) as (B, 3, height, width) from -1 to 1."""
    return (values.movedim(-1, 1).float() / 127.5 - 1).to(dtype)


def mean_state(encoder: PreTrainedModel, pixels: Tensor) -> Tensor:
    """The mean (B, D) over an encoder's positions, of pictures (B, C, height, width).

    Where an encoder has learned positions for pictures of another size, they are interpolated. One that hides patches
    must have been told to hide none.
    """
    takes: Any = signature(encoder.forward).parameters
    more: dict[str, Any] = {}
    size: Any = getattr(encoder.config, "image_size", None)
    known = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if "interpolate_pos_encoding" in takes and tuple(pixels.shape[2:]) != known:
        more["interpolate_pos_encoding"] = True
    if "noise" in takes:
        patches = (pixels.shape[2] // encoder.config.patch_size) * (pixels.shape[3] // encoder.config.patch_size)
        more["noise"] = torch.arange(patches, device=pixels.device).float().expand(len(pixels), -1)  # in their order
    found = encoder(pixel_values=pixels, **more)
    states = found.last_hidden_state  # (B, T, D), or of a convolutional one (B, D, height, width)
    mean_BD: Tensor = found.pooler_output.flatten(1) if states.ndim == 4 else states.mean(1)
    return mean_BD


def width_of(config: PretrainedConfig) -> int:
    """D of an encoder."""
    sizes: Any = config
    return int(getattr(sizes, "hidden_size", None) or sizes.hidden_sizes[-1])


def bare_encoder(config: PretrainedConfig) -> PreTrainedModel:
    """The encoder of a configuration, without what would not be trained, or not alike on all ranks."""
    # A pooler of its own would never be trained: the mean over positions is taken.
    pooled = "add_pooling_layer" in signature(cast("type", MODEL_MAPPING[type(config)])).parameters
    made: Any = AutoModel.from_config(config, **({"add_pooling_layer": False} if pooled else {}))
    made.group_normed = group_norms(made)  # then transformers cannot load it
    return made  # type: ignore[no-any-return]


def group_norms(model: nn.Module) -> bool:
    """Replace every batch norm of `model` by a group norm (https://arxiv.org/abs/1803.08494); whether there was one.

    The running means of a batch norm are of one rank's micro-batches: ranks would differ, and so would the same batch
    in other micro-batches.
    """
    found = False
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                channels, found = child.num_features, True
                wanted = min(_GROUPS, max(1, channels // _NARROWEST))
                groups = next(number for number in range(wanted, 0, -1) if channels % number == 0)
                setattr(module, name, nn.GroupNorm(groups, channels, eps=child.eps))
    return found


def build_masked_autoencoder(
    config: ModelConfig, given: dict[str, Any], seed: int, zero3: dict[str, Any] | None = None
) -> Any:
    """A `vit_mae` of transformers with its decoder; `given` are keys of its configuration beside `model.config`.

    Raises:
        UserError: another kind, as `build_sized`, or patches that do not fit.
    """
    table = ModelConfig(kind="vit_mae", init=config.init, depth=config.depth, config=config.config | given)
    model = build_sized(table, ViTMAEConfig, seed, zero3, AutoModelForPreTraining)
    sizes = model.config
    patches = model.vit.embeddings.patch_embeddings.num_patches
    if not isinstance(sizes.image_size, int) or not isinstance(sizes.patch_size, int):
        raise UserError("model.config: image_size and patch_size of a vit_mae are one number each")
    if sizes.image_size % sizes.patch_size or not 0 < int(patches * (1 - sizes.mask_ratio)) < patches:
        raise UserError(
            f"model.config.image_size = {sizes.image_size} must be a multiple of patch_size = {sizes.patch_size}, and "
            f"objective.share = {sizes.mask_ratio} must hide some of the {patches} patches and not all"
        )
    if config.init == "random":
        _place(model.decoder, patches, seed)
    return model


@torch.no_grad()
def _place(decoder: Any, patches: int, seed: int) -> None:
    """Positions of the decoder, which transformers sets to 0 in `_init_weights`: it could not tell patches apart."""
    with whole([decoder.decoder_pos_embed, decoder.mask_token]), torch.random.fork_rng(devices=[]):
        torch.manual_seed(module_seed(seed, "decoder positions"))
        decoder.initialize_weights(patches)
