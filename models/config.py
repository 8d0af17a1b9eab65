"""The `[model]` section, and sections of models that objectives name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from millrace.core.config import option, section


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What is trained, and from which weights."""

    kind: str = option("qwen3", "architecture: any causal language model of transformers (its model_type)")
    depth: int | None = option(None, "layers; sets every other size too (width = 64 x depth), config keys win")
    init: str = option("random", "'random', or a Hugging Face folder or hub name to start from (it sets kind)")
    config: dict[str, Any] = option({}, "keys of the transformers configuration class, passed through")
    attention: str = option("auto", "'auto', or 'documents', 'sdpa', 'eager' or another name known to transformers")

    def __post_init__(self) -> None:
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"model.depth = {self.depth}: a model has at least one layer")
        if self.depth is not None and self.init != "random":
            raise ValueError(
                f"model.depth = {self.depth} with model.init = '{self.init}': the folder already has its sizes; "
                "leave model.depth out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MelConfig:
    """How a sound becomes bands over time."""

    rate: int = option(16000, "frames of a second, as in the view of the sounds")
    window: int = option(400, "frames of a window")
    hop: int = option(160, "frames between windows")
    bands: int = option(80, "mel bands")
    floor: float = option(1e-5, "energies below it count as this much")

    def __post_init__(self) -> None:
        if min(self.rate, self.window, self.hop, self.bands) < 1 or self.floor <= 0:
            raise ValueError("rate, window, hop and bands must be at least 1, and floor above 0")

    def hops(self, frames: int) -> int:
        """Hops of a sound of so many frames."""
        return 1 + frames // self.hop


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """An encoder, and what it is given."""

    modality: Literal["text", "image", "audio"] = option("text", "what it encodes")
    view: str = option("", "the name of what it is given in a batch; tokens, image or audio if empty")
    kind: str = option("bert", "architecture: a model_type of transformers, such as bert, vit, convnextv2, resnet")
    config: dict[str, Any] = option({}, "keys of its configuration class")
    mel: MelConfig = section(MelConfig, "of sounds, which are shown to the encoder as pictures of one channel")

    @property
    def name(self) -> str:
        """What it is given."""
        return self.view or {"text": "tokens"}.get(self.modality, self.modality)


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """What looks at images for a language model."""

    kind: str = option(
        "pixtral",
        "architecture: pixtral, for images of any size; or, where all images have one, one that has a patch_size, such "
        "as clip_vision_model or siglip_vision_model",
    )
    init: str = option("random", "'random', or a Hugging Face folder or hub name of one to start from (it sets kind)")
    config: dict[str, Any] = option({}, "keys of its configuration class; patches are those that images cost")
