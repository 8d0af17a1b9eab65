"""Sections of the objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from millrace.core.config import build, option, section
from millrace.core.errors import UserError
from millrace.models.config import TowerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalLMConfig:
    """Predict every next token of every document."""

    kind: Literal["causal_lm"] = option("causal_lm", "which objective")
    z_loss: float = option(0.0, "weight of the squared log-partition (PaLM used 1e-4), which keeps logits small")
    chunk: int = option(0, "tokens whose logits are held at once; 0: 2,048 on a GPU, 512 on a CPU (its cache)")

    def __post_init__(self) -> None:
        if self.z_loss < 0 or self.chunk < 0:
            raise UserError(f"[objective] needs z_loss >= 0 and chunk >= 0, not {self.z_loss} and {self.chunk}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedLMConfig:
    """Hide tokens and guess them from both sides (BERT)."""

    kind: Literal["masked_lm"] = option("masked_lm", "which objective")
    share: float = option(0.15, "of the tokens that are hidden; 0.3 is often better (arXiv:2202.08005)")

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"objective.share = {self.share}: give a share between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanCorruptionConfig:
    """Write what stood in the gaps of a text (T5)."""

    kind: Literal["span_corruption"] = option("span_corruption", "which objective")
    share: float = option(0.15, "of the tokens that are replaced")
    span: float = option(3.0, "tokens of a gap, on average")

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.span < 1:
            raise UserError(
                f"[objective] needs a share between 0 and 1 and a span of 1 or more, not {self.share} and {self.span}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CriticConfig:
    """What tells real from made."""

    width: int = option(64, "channels of its first layer")
    layers: int = option(3, "that make its input coarser")
    scales: int = option(1, "at which it looks, each half as fine as the one before")
    lr: float = option(1.0, "its learning rate, in parts of the run's")

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.scales) < 1 or self.lr <= 0:
            raise UserError("[objective.adversary] needs width, layers and scales of at least 1, and lr above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdversaryConfig(CriticConfig):
    """What tells real from made, beside what restores."""

    weight: float = option(0.0, "of its opinion beside the reconstruction, whose gradient it is scaled to; 0: none")
    matching: float = option(1.0, "of its features, which shall be alike for real and made")
    start: int = option(0, "step from which its opinion counts; it learns from the first")

    def __post_init__(self) -> None:
        CriticConfig.__post_init__(self)
        if min(self.weight, self.matching, self.start) < 0:
            raise UserError("[objective.adversary] needs weight, matching and start of 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecConfig:
    """Code images or sounds and restore them (VQ-VAE, VQGAN, FSQ, VAE)."""

    kind: Literal["codec"] = option("codec", "which objective")
    view: str = option("", "the name in a batch of what is coded; image or audio if empty")
    weight: float = option(
        0.25, "of what the bottleneck costs: 0.25 for vq, 1e-6 to 1 for kl, in nats a latent; fsq and none have no cost"
    )
    spectra: float = option(1.0, "weight of the distance between spectra at several scales, of waveforms")
    decay: float = option(0.99, "of the running means that codes follow")
    adversary: AdversaryConfig = section(AdversaryConfig, "beside the codec")

    def __post_init__(self) -> None:
        if self.weight < 0 or self.spectra < 0 or not 0 <= self.decay < 1:
            raise UserError("[objective] needs weight and spectra of 0 or more, and decay from 0 to below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class GanConfig:
    """Make images or sounds from noise, and words, that an adversary takes for real."""

    kind: Literal["gan"] = option("gan", "which objective")
    view: str = option("", "the name in a batch of what is real; image or audio if empty")
    decay: float = option(0.999, "of the running mean of the generator's weights, which people get to see")
    adversary: CriticConfig = section(CriticConfig, "what judges")

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"objective.decay = {self.decay}: give a number from 0 to below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveConfig:
    """Bring the modalities of a sample near each other, away from those of all others (CLIP, SigLIP)."""

    kind: Literal["contrastive"] = option("contrastive", "which objective")
    towers: list[dict[str, Any]] = option(
        [],
        "encoders, such as [{modality = 'image', kind = 'vit', config = {…}}, {modality = 'text', kind = 'bert', …}]",
    )
    width: int = option(256, "of the space that they share")
    loss: Literal["softmax", "sigmoid"] = option("softmax", "softmax: which sample is it; sigmoid: is it this one")
    scale: float = option(10.0, "similarities are multiplied by it at first; it is learned")
    bias: float = option(0.0, "and shifted by it, learned too; SigLIP begins with scale 10 and bias -10")

    def __post_init__(self) -> None:
        if self.width < 1 or self.scale <= 0:
            raise UserError(f"[objective] needs width >= 1 and scale > 0, not {self.width} and {self.scale}")
        names = [tower.name for tower in self.built()]
        if len(names) == 1 or len(set(names)) < len(names):
            raise UserError(f"objective.towers need two encoders or more, of different views; not {', '.join(names)}")

    def built(self) -> list[TowerConfig]:
        """The encoders."""
        return [build(TowerConfig, tower) for tower in self.towers]
