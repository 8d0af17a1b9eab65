"""Texts that follow images: LLaVA (Liu et al., https://arxiv.org/abs/2304.08485) over packed documents.

Images stand in their rows as features of an encoder, one at each position that the loader reserved for a patch. B rows,
T positions, P patches of all images of a micro-batch, D hidden.
"""

from __future__ import annotations

import dataclasses
import json
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from millrace.core.config import build
from millrace.core.errors import UserError
from millrace.data.batch import Media, MicroBatch
from millrace.data.modalities.image import ImageCost
from millrace.data.tokenizer import Tokenizer
from millrace.models.heads import LogitsTransform
from millrace.models.packing import check_packable, document_inputs
from millrace.models.vision_language import (
    Pictures,
    build_vision_language,
    fixed_size,
    idle_weights,
    image_features,
    llava_config,
    pixels,
)
from millrace.pretrain.objectives.base import OneModule, Setting, model_files
from millrace.pretrain.objectives.config import VisionLanguageConfig
from millrace.pretrain.objectives.head_loss import LossHead

IMAGE = {"image_token": "<|image|>"}


class VisionLanguage(OneModule):
    """Predict every next token of texts that follow images, and of texts without."""

    tokenizer: Tokenizer

    def __init__(self, model: Any, setting: Setting) -> None:
        super().__init__(VisionLanguageModule(model, setting.objective))
        config = model.config
        self.name = f"{config.text_config.model_type} that sees through {config.vision_config.model_type}"
        self.tokenizer = setting.tokenizer.extended(IMAGE)
        self._model, self._token, self._side = model, config.image_token_id, fixed_size(config)
        self._rule = build(ImageCost, setting.costs["image"])

    @classmethod
    def check(cls, setting: Setting) -> None:
        if setting.rows == "samples":
            raise UserError("objective.kind = 'vision_language' needs data.rows = 'packed' or 'alone', not 'samples'")
        if list(setting.costs) != ["image"]:
            found = f"they have {', '.join(setting.costs)}" if setting.costs else "they have none"
            raise UserError(
                f"objective.kind = 'vision_language' needs samples of images and text, and no other media; {found} "
                "(millrace prepare --image COLUMN --text COLUMN)"
            )
        config = llava_config(setting.model, setting.objective.vision, *_sizes(setting))
        if setting.rows == "packed":
            check_packable(config.text_config.model_type)

    @classmethod
    def build(cls, setting: Setting) -> VisionLanguage:
        vision, sizes = setting.objective.vision, _sizes(setting)
        return cls(build_vision_language(setting.model, vision, *sizes, setting.seed, setting.zero3), setting)

    def view(self, micro: MicroBatch) -> MicroBatch:
        """The rows with the image's token at its positions, and images of whole patches, in the order of the rows."""
        inputs, media = micro.input_ids_BT.clone(), []
        for medium in sorted(micro.media, key=lambda medium: (medium.row, medium.start)):
            inputs[medium.row, medium.start : medium.start + medium.positions] = self._token
            media.append(dataclasses.replace(medium, value=self._fitted(medium)))
        return dataclasses.replace(micro, input_ids_BT=inputs, media=media)

    def _fitted(self, medium: Media) -> Tensor:
        value = torch.from_numpy(self._rule.fitted(medium.value.numpy()))
        height, width, _ = value.shape
        assert height * width == medium.positions * self._rule.patch**2, "counted by another rule"
        if self._side and (height, width) != (self._side, self._side):
            raise UserError(
                f"an image of {width} x {height} pixels, and an encoder for {self._side} x {self._side}: set "
                f"objective.vision.config.image_size, or objective.vision.kind = 'pixtral' for images of several sizes"
            )
        return value

    def files(self) -> dict[str, str]:
        """What `AutoImageProcessor` needs lies with the tokenizer, as in every folder of transformers."""
        preprocessor = {
            "image_processor_type": "PixtralImageProcessor" if self._side is None else "CLIPImageProcessor",
            "patch_size": {"height": self._rule.patch, "width": self._rule.patch},
            "size": {"longest_edge": self._rule.patch * isqrt(self._rule.most)},
            "resample": 3,  # bicubic
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        if self._side is not None:
            preprocessor |= {"size": {"height": self._side, "width": self._side}, "do_center_crop": False}
        return model_files(self._model) | {"tokenizer/preprocessor_config.json": json.dumps(preprocessor, indent=1)}


def _sizes(setting: Setting) -> tuple[Pictures, tuple[int, int]]:
    tokenizer, rule = setting.tokenizer.extended(IMAGE), build(ImageCost, setting.costs["image"])
    pictures = Pictures(tokenizer.special("image_token"), rule.patch, rule.most)
    return pictures, (tokenizer.vocab_size, setting.sequence_length)


class VisionLanguageModule(nn.Module):
    """A `llava` of transformers whose forward returns the loss summed over this micro-batch's targets."""

    figures = ("loss", "max_logit")

    def __init__(self, model: Any, config: VisionLanguageConfig) -> None:
        super().__init__()
        self.model = model
        LossHead.adopt(model.lm_head, z_loss=config.z_loss, transform=LogitsTransform(), chunk=config.chunk)
        inner = model.model
        parts = {
            "vision": [inner.vision_tower],
            "projector": [inner.multi_modal_projector],
            "text": [inner.language_model, model.lm_head],
        }
        for name, modules in parts.items():
            for module in modules:
                module.requires_grad_(name in config.train)
        idle = idle_weights(model.config)
        for name, param in inner.vision_tower.named_parameters():
            if name in idle:
                param.requires_grad_(False)  # optimisers keep no moments of what never has a gradient

    def inputs(self, micro: MicroBatch, device: torch.device) -> dict[str, Any]:
        """The arguments of `forward` from a view of a micro-batch."""
        length = micro.input_ids_BT.shape[1]
        places = [torch.arange(m.row * length + m.start, m.row * length + m.start + m.positions) for m in micro.media]
        positions_BT = micro.position_ids_BT.to(device, non_blocking=True)
        attention = self.model.config.text_config._attn_implementation
        return {
            "input_ids_BT": micro.input_ids_BT.to(device, non_blocking=True),
            "labels_BT": micro.labels_BT.to(device, non_blocking=True),
            "places_P": torch.cat([*places, torch.empty(0, dtype=torch.long)]).to(device, non_blocking=True),
            "images": pixels([medium.value for medium in micro.media], self.model.config, device),
            "documents": document_inputs(positions_BT, micro.seq_lens, attention),
        }

    def forward(
        self,
        input_ids_BT: Tensor,
        labels_BT: Tensor,
        places_P: Tensor,
        images: dict[str, Any],
        documents: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """`places_P` are the patches' places among all B · T positions.

        The encoder runs on every rank: where there is no image on a blank one, of which no feature is taken, so that
        its weights get a gradient of zero. Else ranks would wait for each other, or add up what is not alike (ZeRO 1
        to 3), and without sharding a step without images would leave out decay and momentum that it has elsewhere.

        Returns:
            (loss summed over targets, float32 scalar with gradient; [summed nll, largest logit], detached).
        """
        features_PD = image_features(self.model, **images)[: len(places_P)]
        embedded_BTD = self.model.get_input_embeddings()(input_ids_BT)
        flat = embedded_BTD.flatten(0, 1).index_copy(0, places_P, features_PD.to(embedded_BTD.dtype))
        states = self.model.model.language_model(inputs_embeds=flat.view_as(embedded_BTD), **documents)
        return self.model.lm_head(states.last_hidden_state, labels=labels_BT)  # type: ignore[no-any-return]
