"""Language models that see: an image encoder, a projector and a decoder, as LLaVA (https://arxiv.org/abs/2304.08485).

The architecture is `llava` of transformers, around any decoder whose documents stay apart. With the encoder of Pixtral
(https://arxiv.org/abs/2410.07073) images of several sizes go through it in one call: rotary embeddings in two
dimensions tell it where a patch is. N images, P patches of all of them, H heads, D width of a head or hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from millrace.core.errors import UserError, did_you_mean
from millrace.models.architecture import architecture
from millrace.models.bridge import checked, construct, hf_config, trainable, without_dropout
from millrace.models.config import ModelConfig, VisionConfig
from millrace.models.heads import LogitsTransform, logits_transform
from millrace.models.weights import hub_file, load_weights

ANY_SIZE = "pixtral"
# Its name says "flash", which keeps Pixtral from making a mask over all pairs of patches of all images.
ATTENTION = "flash_images"
# Encoders, and which of their states LLaVA takes: all, or all but the first, which belongs to no patch.
_ENCODERS: dict[str, Any] = {ANY_SIZE: "full", "clip_vision_model": "default", "siglip_vision_model": "full"}


@dataclasses.dataclass(frozen=True)
class Pictures:
    """How images stand in a row: the token of a position, pixels on the side of its patch, positions of an image."""

    token: int
    patch: int
    most: int


def build_vision_language(
    model: ModelConfig,
    vision: VisionConfig,
    pictures: Pictures,
    lengths: tuple[int, int],
    seed: int,
    zero3: dict[str, Any] | None = None,
) -> Any:
    """A `llava` whose decoder is `model` and whose encoder is `vision`, with weights as `bridge.build_model` says.

    `lengths` are (vocabulary, sequence length). `model.init` may also be a folder of a whole `llava`.

    Raises:
        UserError: as `llava_config`; or weights that do not fit, by name.
    """
    config = llava_config(model, vision, pictures, lengths)
    whole = is_llava(model.init)

    def make() -> PreTrainedModel:
        made: PreTrainedModel = LlavaForConditionalGeneration._from_config(config)
        return made

    made: Any = construct(make, None if whole else seed, zero3)
    if config.vision_config.model_type == ANY_SIZE:
        made.model.vision_tower.config._attn_implementation = ATTENTION
    if whole:
        load_weights(made, model.init)
        return made
    if vision.init != "random":
        load_weights(made.model.vision_tower, vision.init)
    if model.init != "random":
        load_weights(_decoder(made), model.init)
    return made


def is_llava(folder: str) -> bool:
    """Whether `model.init` is a whole model that sees."""
    if folder == "random":
        return False
    return isinstance(checked(lambda: AutoConfig.from_pretrained(hub_file(folder, "config.json"))), LlavaConfig)


def _decoder(made: Any) -> PreTrainedModel:
    """The decoder as the causal model that it is in a folder of its own."""
    with torch.device("meta"):
        causal: PreTrainedModel = AutoModelForCausalLM.from_config(made.config.text_config)
    setattr(causal, causal.base_model_prefix, made.model.language_model)
    causal.set_output_embeddings(made.lm_head)
    return causal


def llava_config(model: ModelConfig, vision: VisionConfig, pictures: Pictures, lengths: tuple[int, int]) -> Any:
    """The `LlavaConfig` of what `build_vision_language` builds.

    Raises:
        UserError: sizes or keys that transformers refuses, a decoder that does more after its head than a `llava`
            does, an encoder with other patches than the images were counted by.
    """
    if is_llava(model.init):
        if model.config or vision != VisionConfig():
            raise UserError(
                f"model.init = '{model.init}' is a whole model that sees; leave model.config and objective.vision out"
            )
        config: Any = AutoConfig.from_pretrained(hub_file(model.init, "config.json"))
        trainable(config.text_config, model, lengths)
        config.dtype = torch.float32
    else:
        text, tower = hf_config(model, *lengths), _vision_config(vision, pictures.patch)
        attention = text._attn_implementation
        config = checked(
            lambda: LlavaConfig(
                vision_config=tower,
                text_config=text,
                vision_feature_layer=-1,
                vision_feature_select_strategy=_ENCODERS.get(tower.model_type, "full"),
                tie_word_embeddings=text.tie_word_embeddings,
            )
        )
        config.text_config._attn_implementation = attention  # which the whole has just forgotten
    config.image_token_index, config.image_seq_length = pictures.token, pictures.most
    _check(config, pictures.patch)
    return config


def _vision_config(vision: VisionConfig, patch: int) -> PretrainedConfig:
    if vision.init != "random":
        return checked(lambda: AutoConfig.from_pretrained(hub_file(vision.init, "config.json"), **vision.config))
    if vision.kind not in _ENCODERS:
        hint = did_you_mean(vision.kind, list(_ENCODERS)) or f"; take one of {', '.join(_ENCODERS)}"
        raise UserError(f"objective.vision.kind = '{vision.kind}' is no encoder that a llava can have here{hint}")
    cls: Any = CONFIG_MAPPING[vision.kind]
    known = {field.name for field in dataclasses.fields(cls)}
    for key in vision.config:
        if key not in known:
            hint = did_you_mean(key, known) or f"; known: {', '.join(sorted(known))}"
            raise UserError(f"unknown key 'objective.vision.config.{key}' for kind '{vision.kind}'{hint}")
    # A head that pools would never be trained.
    defaults = {"patch_size": patch, **({"vision_use_head": False} if "siglip" in vision.kind else {})}
    return checked(lambda: cls(**defaults | without_dropout(cls) | vision.config))


def _check(config: Any, patch: int) -> None:
    text, tower = config.text_config, config.vision_config
    if tower.model_type not in _ENCODERS:
        raise UserError(f"an encoder '{tower.model_type}' cannot be trained here; known: {', '.join(_ENCODERS)}")
    if tower.patch_size != patch:
        raise UserError(
            f"the encoder has patches of {tower.patch_size} pixels, but images were counted by patches of {patch}: "
            f"prepare them with --image-patch {tower.patch_size}, or set objective.vision.config.patch_size"
        )
    width = tower.hidden_size // tower.num_attention_heads
    if tower.model_type == ANY_SIZE and width % 4:
        raise UserError(f"heads of {width} in objective.vision.config: rotary embeddings need a multiple of 4")
    record = architecture(text.model_type)
    if record is not None and record.fp32:
        raise UserError(
            f"model.kind = '{text.model_type}' is recurrent, and a llava has no place for states; take qwen3"
        )
    if logits_transform(text) != LogitsTransform():
        raise UserError(
            f"model.kind = '{text.model_type}' changes its logits after the head, which a llava does not; take qwen3"
        )


def fixed_size(config: Any) -> int | None:
    """Pixels on the sides of every image, where the encoder of a `LlavaConfig` takes one size only."""
    return None if config.vision_config.model_type == ANY_SIZE else int(config.vision_config.image_size)


def pixels(images: Sequence[Tensor], config: Any, device: torch.device) -> dict[str, Any]:
    """What transformers is given of `images`, uint8 (height, width, 3) of whole patches each; a blank one for none.

    Returns:
        `pixel_values` float32 (N, 3, height, width) from -1 to 1, smaller ones with padding, and `image_sizes`, the
        height and width of each, which an encoder for one size is not given.
    """
    side = fixed_size(config) or config.vision_config.patch_size
    images = images or [torch.zeros(side, side, 3, dtype=torch.uint8)]
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    padded = torch.zeros(len(images), max(h for h, _ in sizes), max(w for _, w in sizes), 3, dtype=torch.uint8)
    for row, image in zip(padded, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    values = padded.to(device, non_blocking=True).movedim(-1, 1).float() / 127.5 - 1
    return {"pixel_values": values, **({} if fixed_size(config) else {"image_sizes": sizes})}


@torch.compiler.disable
def image_features(model: Any, pixel_values: Tensor, image_sizes: list[tuple[int, int]] | None = None) -> Tensor:
    """What stands in the place of the tokens of images, image after image, row of patches after row: (P, D)."""
    more: dict[str, Any] = {}
    if image_sizes is not None:
        patch = model.config.vision_config.patch_size
        more = {"image_sizes": image_sizes, "patches": [(h // patch) * (w // patch) for h, w in image_sizes]}
    return torch.cat(list(model.model.get_image_features(pixel_values, **more).pooler_output))


def idle_weights(config: Any) -> set[str]:
    """Names of an encoder's weights that no feature depends on: of a layer behind the one that is taken, of a pooler.

    Found without weights; Pixtral has none.
    """
    if fixed_size(config) is None:
        return set()
    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(config)
    image_features(model, **pixels([], config, torch.device("meta"))).sum().backward()
    return {name for name, param in model.model.vision_tower.named_parameters() if param.grad is None}


def images_attention(
    module: torch.nn.Module,
    query_1HPD: Tensor,
    key_1HPD: Tensor,
    value_1HPD: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention image by image: what a mask over all of them computes, without the work that it discards.

    How many patches each has is told by `patches`, or by the borders that transformers hands to flash attention.
    """
    counts = kwargs.get("patches") or kwargs["cu_seq_lens_q"].diff().tolist()
    dtype = value_1HPD.dtype  # under autocast, rotary embeddings leave queries and keys in fp32
    parts = zip(*(heads.to(dtype).split(counts, dim=2) for heads in (query_1HPD, key_1HPD, value_1HPD)), strict=True)
    scale = kwargs.get("scaling")
    made = [F.scaled_dot_product_attention(q, k, v, scale=scale) for q, k, v in parts]
    return torch.cat(made, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, images_attention)
