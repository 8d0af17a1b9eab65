"""Sections of the objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from millrace.core.config import build, option, section
from millrace.core.errors import UserError
from millrace.models.config import TowerConfig, VisionConfig
from millrace.models.templates import Template
from millrace.models.vocabulary import TEXT


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
class AnyToAnyConfig:
    """Read and write text and the codes of images and sounds with one decoder."""

    kind: Literal["any_to_any"] = option("any_to_any", "which objective")
    templates: list[dict[str, Any]] = option(
        [], "rows that samples become: [{row = 'image > text', weight = 1}, {row = 'text > image'}, {row = 'text'}, …]"
    )
    prompt: float = option(0.25, "weight of the loss of a token before the '>'; one behind it has 1")
    weights: dict[str, float] = option({}, "further weights by modality, such as {text = 4.0}")
    drop: float = option(0.1, "of the prompts are left out, so that what is made can be guided")
    z_loss: float = option(0.0, "weight of the squared log-partition, as of causal_lm")
    chunk: int = option(0, "tokens whose logits are held at once, as of causal_lm")

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1 or min(self.prompt, self.z_loss, self.chunk, *self.weights.values()) < 0:
            raise UserError(
                "[objective] needs drop from 0 to below 1, and prompt, weights, z_loss and chunk of 0 or more"
            )
        known = {name for template in self.built() for name in template.parts}
        if self.templates and (odd := sorted(set(self.weights) - known)):
            raise UserError(
                f"objective.weights: no template has {', '.join(odd)}; they have {', '.join(sorted(known))}"
            )

    def built(self) -> list[Template]:
        """The templates.

        Raises:
            UserError: keys that templates do not have, or a row that is none.
        """
        for given in self.templates:
            if not isinstance(given.get("row"), str) or set(given) - {"row", "weight"}:
                raise UserError(f"objective.templates: {given} must be such as {{row = 'image > text', weight = 1}}")
        return [Template.parse(given["row"], given.get("weight", 1.0)) for given in self.templates]

    def media(self) -> list[str]:
        """The modalities beside text."""
        return list(dict.fromkeys(name for template in self.built() for name in template.parts if name != TEXT))


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig(CausalLMConfig):
    """Predict every next token as a larger model does, and as the text does."""

    kind: Literal["distillation"] = option("distillation", "which objective")  # type: ignore[assignment]
    teacher: str = option("", "the larger model: a run directory, a step-N folder or a Hugging Face folder")
    weight: float = option(0.5, "of the divergence from the teacher; the text has the rest of 1")
    temperature: float = option(2.0, "by which the logits of both are divided before they are compared")

    def __post_init__(self) -> None:
        CausalLMConfig.__post_init__(self)
        if not 0 < self.weight <= 1 or self.temperature <= 0:
            raise UserError(
                "[objective] needs a weight above 0 and at most 1, and a temperature above 0, not "
                f"{self.weight} and {self.temperature}"
            )


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
    penalty: float = option(0.0, "of how steep it is around what is real, in units of R1's gamma; 0: none")

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.scales) < 1 or self.lr <= 0 or self.penalty < 0:
            raise UserError(
                "[objective.adversary] needs width, layers and scales of at least 1, lr > 0 and penalty >= 0"
            )


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


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedImageConfig:
    """Hide most patches of a picture and paint them (MAE)."""

    kind: Literal["masked_image"] = option("masked_image", "which objective")
    view: str = option("image", "the name in a batch of the pictures")
    share: float = option(0.75, "of the patches that are hidden")
    normalise: bool = option(True, "a hidden patch is painted less its mean, in units of its deviation")

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"objective.share = {self.share}: give a share between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfDistillationConfig:
    """Agree about several views of a picture with a teacher, the running mean of oneself (DINO)."""

    kind: Literal["self_distillation"] = option("self_distillation", "which objective")
    large: str = option("large", "the name of the views that the teacher sees, too")
    small: str = option("small", "the name of those that only the student sees; there may be none")
    outputs: int = option(4096, "among which student and teacher agree; 65,536 for a million pictures")
    hidden: int = option(2048, "width of the head's two hidden layers")
    bottleneck: int = option(256, "width of what its last layer is given")
    temperature: float = option(0.1, "of the student")
    sharpness: float = option(0.04, "temperature of the teacher, below the student's")
    decay: float = option(0.996, "of the running mean that the teacher is")
    centre: float = option(0.9, "decay of the mean of the teacher's outputs, which is taken off them")

    def __post_init__(self) -> None:
        if min(self.outputs, self.hidden, self.bottleneck) < 1 or not 0 < self.sharpness <= self.temperature:
            raise UserError(
                "[objective] needs outputs, hidden and bottleneck of at least 1, and 0 < sharpness <= temperature, not "
                f"{self.outputs}, {self.hidden}, {self.bottleneck}, {self.sharpness} and {self.temperature}"
            )
        if not 0 <= self.decay < 1 or not 0 <= self.centre < 1:
            raise UserError("[objective] needs decay and centre from 0 to below 1")
        if not self.large or self.large == self.small:
            raise UserError("objective.large and objective.small are the names of two kinds of views")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsistencyConfig:
    """Classify images or sounds with few labels: two views of the same sample shall be of one class (FixMatch)."""

    kind: Literal["consistency"] = option("consistency", "which objective")
    classes: list[str] = option([], "what a labelled sample's text may be; a sample without text has no label")
    encoder: TowerConfig = section(TowerConfig, "what is trained, below a linear head")
    weight: float = option(1.0, "of the samples without a label; 0: learn from labels alone")
    threshold: float = option(0.95, "share of probability from which on the likeliest class of a weak view is believed")
    decay: float = option(0.999, "of the running mean of the weights, which is what is evaluated")

    def __post_init__(self) -> None:
        if len(set(self.classes)) < len(self.classes) or "" in self.classes:
            raise UserError(f"objective.classes = {self.classes}: give every class once, by a name that is not empty")
        if self.weight < 0 or not 0 <= self.threshold <= 1 or not 0 <= self.decay < 1:
            raise UserError(
                "[objective] needs a weight of 0 or more, a threshold from 0 to 1, and decay from 0 to below 1"
            )


VISION_LANGUAGE_PARTS = ("vision", "projector", "text")


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionLanguageConfig(CausalLMConfig):
    """Predict every next token of texts that follow images, from both (LLaVA)."""

    kind: Literal["vision_language"] = option("vision_language", "which objective")  # type: ignore[assignment]
    vision: VisionConfig = section(VisionConfig, "what looks at the images; [model] is what reads and writes")
    train: list[str] = option(
        list(VISION_LANGUAGE_PARTS), "what is trained; ['projector'] first, where both sides were trained before"
    )

    def __post_init__(self) -> None:
        CausalLMConfig.__post_init__(self)
        if not self.train or not set(self.train) <= set(VISION_LANGUAGE_PARTS):
            raise UserError(f"objective.train = {self.train}: name some of {', '.join(VISION_LANGUAGE_PARTS)}")
