"""What a model that sees says about images, and how likely it finds what is said of them.

The model is a `llava` of transformers, from a run or exported; see `millrace.pretrain.objectives.vision_language`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaConfig

from millrace.core.errors import UserError
from millrace.data.decoders import image as decoder
from millrace.data.modalities.image import ImageCost
from millrace.data.tokenizer import Tokenizer
from millrace.eval.generate import continue_text
from millrace.eval.subject import Subject
from millrace.models.vision_language import pixels


class Looking:
    """A tokenizer before whose texts an image stands: of one what `continue_text` asks."""

    def __init__(self, tokenizer: Tokenizer, positions: int) -> None:
        self._tokenizer, self.bos_id, self.eos_id = tokenizer, tokenizer.bos_id, tokenizer.eos_id
        self._image = np.full(positions, tokenizer.special("image_token"), np.int32)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each, with the image's before them."""
        return [np.concatenate([self._image, ids]) for ids in self._tokenizer.encode(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""
        return self._tokenizer.decode(ids)


def sees(source: str | Path) -> bool:
    """Whether a run, a `step-N` folder or an export is a `llava`."""
    folder = Path(source)
    there = [folder / "config.json", folder / "model" / "config.json"]
    found = [path for path in (*there, *sorted(folder.glob("checkpoints/step-*/model/config.json"))) if path.is_file()]
    return bool(found) and json.loads(found[-1].read_text(encoding="utf-8")).get("model_type") == LlavaConfig.model_type


def read_image(raw: bytes) -> np.ndarray:
    """The pixels (height, width, 3) of an encoded image, uint8.

    Raises:
        UserError: it is none.
    """
    try:
        return decoder.decode(raw)
    except ValueError as error:
        raise UserError(f"the image cannot be decoded: {error}") from None


def look(model: Any, tokenizer: Tokenizer, image: np.ndarray) -> tuple[Looking, dict[str, Any]]:
    """(a tokenizer that puts the image before a text, what the model's forward gets beside the tokens).

    Raises:
        UserError: the model does not see.
    """
    config: Any = model.config
    if config.model_type != LlavaConfig.model_type:
        raise UserError(f"a '{config.model_type}' does not see; train one with objective.kind = 'vision_language'")
    rule = ImageCost(patch=config.vision_config.patch_size, most=config.image_seq_length)
    fitted = rule.fitted(image)
    given = pixels([torch.from_numpy(fitted)], config, model.get_input_embeddings().weight.device)
    return Looking(tokenizer, fitted.shape[0] * fitted.shape[1] // rule.patch**2), given


def describe(subject: Subject, images: Sequence[np.ndarray], prompts: Sequence[str], **how: Any) -> list[str]:
    """How each prompt goes on after its image (height, width, 3), uint8; `how` as for `continue_text`.

    Raises:
        UserError: the model does not see, or has fewer positions than asked for.
    """
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        looking, given = look(subject.model, subject.tokenizer, image)
        dataclasses.replace(subject, tokenizer=looking).check_length([prompt], how["tokens"])  # type: ignore[arg-type]
        found += continue_text(subject.model, looking, [prompt], **how, **given)
    return found


@torch.no_grad()
def text_nll(model: Any, tokenizer: Tokenizer, image: np.ndarray | None, texts: Sequence[str]) -> list[float]:
    """How unlikely each text is, up to its end, after an image or after none: nats, summed over its tokens."""
    looking, given = look(model, tokenizer, image) if image is not None else (tokenizer, {})
    device, before = model.get_input_embeddings().weight.device, 1 + (len(looking.encode([""])[0]))
    rows = [[looking.bos_id, *ids.tolist(), looking.eos_id] for ids in looking.encode(texts)]
    longest = max(map(len, rows))
    ids_BT = torch.tensor([row + [looking.eos_id] * (longest - len(row)) for row in rows], device=device)
    if image is not None:  # it is looked at once
        features = torch.cat(list(model.model.get_image_features(**given).pooler_output))
        embedded = model.get_input_embeddings()(ids_BT)
        embedded[:, 1:before] = features.to(embedded.dtype)
        logits_BTV = model(inputs_embeds=embedded[:, :-1], use_cache=False).logits
    else:
        logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    nll_BT = torch.nn.functional.cross_entropy(
        logits_BTV[:, before - 1 :].float().transpose(1, 2), ids_BT[:, before:], reduction="none"
    )
    return [float(row[: len(ids) - before].sum()) for row, ids in zip(nll_BT, rows, strict=True)]
