"""An encoder of images whose weights stay as they are: of a run, of a `step-N` folder, or of a Hugging Face folder.

B images, D hidden.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from millrace.core.config import build
from millrace.core.errors import UserError
from millrace.engine.checkpoint.read import open_verified
from millrace.engine.export import VIEW
from millrace.engine.trained import Trained
from millrace.eval.subject import from_pretrained, is_ours
from millrace.models.bridge import construct
from millrace.models.config import TowerConfig
from millrace.models.vision import bare_encoder, mean_state, pictures, width_of

_SIZE = 224  # pixels, where nothing says otherwise


class Encoder:
    """Gives the mean over an encoder's positions, on the GPU where there is one."""

    def __init__(self, model: Any, size: int, origin: dict[str, Any]) -> None:
        """`size` of the pictures in pixels; `origin` as in the description of an evaluation's subject."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.size, self.width = model.to(device).eval(), size, width_of(model.config)
        if hasattr(model.config, "mask_ratio"):
            model.config.mask_ratio = 0.0  # it sees all of a picture now
        parameters = sum(p.numel() for p in model.parameters())
        self.description = {**origin, "parameters": parameters, "dtype": "fp32", "device": device}

    @torch.no_grad()
    def features(self, images: np.ndarray) -> Tensor:
        """Images uint8 (B, size, size, 3) as float32 (B, D) on the CPU."""
        values = torch.from_numpy(images).to(self.model.device)
        return mean_state(self.model, pictures(values)).float().cpu()


def open_encoder(source: str | Path, *, untrained: bool = False) -> Encoder:
    """The image encoder of what `source` names; `untrained`: the same with random weights, to compare with.

    Of self-distillation it is the teacher, of contrastive learning the first tower of images.

    Raises:
        UserError: nothing of that name, a torn or altered checkpoint, or one without an encoder of images.
    """
    path = Path(source)
    config, model, size, origin = _ours(path) if is_ours(path) else _theirs(path)
    if untrained:
        model, origin = construct(lambda: bare_encoder(config), 0), origin | {"step": None, "untrained": True}
    return Encoder(model, size, origin)


Opened = tuple[PretrainedConfig, PreTrainedModel, int, dict[str, Any]]


def _ours(path: Path) -> Opened:
    name = _image_tower(path)
    trained = Trained.open(path, f"towers/{name}", f"towers.{name}.encoder.") if name else Trained.open(path)
    model: Any = trained.load().base_model
    _check_kind(model, path)
    return model.config, model, _size(trained.view(), model.config), {"kind": "checkpoint", **trained.origin()}


def _theirs(path: Path) -> Opened:
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is neither a run directory, nor a checkpoint, nor a Hugging Face folder (config.json)")
    model = from_pretrained(str(path), AutoModel, "pooler.")
    _check_kind(model, path)
    view = json.loads((path / VIEW).read_text(encoding="utf-8")) if (path / VIEW).is_file() else None
    origin = {"kind": "huggingface", "path": str(path), "step": None}
    return model.config, model, _size(view, model.config), origin


def _image_tower(path: Path) -> str:
    """The first tower of images that the newest checkpoint's configuration names; empty if there is none."""
    file = open_verified(path).path / "config.toml"
    table = tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    towers = [build(TowerConfig, tower) for tower in table.get("objective", {}).get("towers", [])]
    return next((tower.name for tower in towers if tower.modality == "image"), "")


def _size(view: dict[str, Any] | None, config: Any) -> int:
    """Pixels on a side: as training looked, or as the model is made for."""
    size = (view or {}).get("size") or getattr(config, "image_size", None) or _SIZE
    return size if isinstance(size, int) else int(max(size))


def _check_kind(model: Any, path: Path) -> None:
    if getattr(model, "main_input_name", "") != "pixel_values":
        raise UserError(
            f"{path} is no encoder of images ({type(model).__name__}): give one with --probe, or use --text"
        )
