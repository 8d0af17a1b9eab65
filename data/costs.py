"""What a sample costs in positions of a sequence: known before anything is decoded, so that samples can be packed.

The cost of a sample is text tokens + 1 + the positions of its image and of its sound; for text alone that is n + 1, the
targets of a document of n tokens. Positions come from the header of the encoded file and from a rule that is stored in
the manifest and belongs to its fingerprint. What feeds a model must use the same rules (`ImageCost.grid`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isqrt
from typing import Any

from millrace.core.config import build, option, section
from millrace.data.sources.base import BadSample, Record


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageCost:
    """Patches of an image, one position each."""

    patch: int = option(16, "pixels on the side of a patch")
    most: int = option(1024, "positions of an image; a larger one is scaled down to at most so many")

    def __post_init__(self) -> None:
        _check_positive(self, "image")

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of patches of an image of so many pixels, ragged ones counted whole.

        One with more than `most` patches is scaled down in proportion: floor(sqrt(most · w / h)) columns, as
        `smart_resize` of Qwen2-VL does (Wang et al., 2024), here in integers and for any aspect ratio.
        """
        columns, rows = -(-width // self.patch), -(-height // self.patch)
        if columns * rows <= self.most:
            return columns, rows
        columns = min(columns, self.most, max(1, isqrt(self.most * width // height)))
        rows = min(rows, self.most // columns, max(1, isqrt(self.most * height // width)))
        return columns, rows

    def positions(self, raw: bytes) -> int:
        """Positions of an encoded image; raises `ValueError` where its header cannot be read."""
        from millrace.data.decoders import image

        width, height = image.size(raw)
        if width < 1 or height < 1:
            raise ValueError(f"its header says {width} x {height} pixels")
        columns, rows = self.grid(width, height)
        return columns * rows


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioCost:
    """Hops of a sound, one position each; the last may be cut short."""

    hop_ms: int = option(20, "milliseconds of sound that make a position")

    def __post_init__(self) -> None:
        _check_positive(self, "audio")

    def positions(self, raw: bytes) -> int:
        """Positions of an encoded sound; raises `ValueError` where its header cannot be read."""
        from millrace.data.decoders import audio

        frames, rate, _ = audio.length(raw)
        if frames < 0 or rate < 1:
            raise ValueError(f"its header says {frames} frames at {rate} Hz")
        return -(-frames * 1000 // (rate * self.hop_ms))


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """The rule of each role; one field and one class here for a new one."""

    image: ImageCost = section(ImageCost, "positions of an image")
    audio: AudioCost = section(AudioCost, "positions of a sound")

    def of(self, columns: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """The rules that samples with these roles need, as the manifest stores them."""
        return {role: rule for role, rule in asdict(self).items() if role in columns}

    @classmethod
    def stored(cls, rules: Mapping[str, Mapping[str, Any]]) -> Costs:
        """The rules that `of` gave."""
        return build(cls, rules)

    def positions(self, record: Record) -> int | BadSample:
        """Positions of all media of a sample; bad where a header cannot be read."""
        total = 0
        for role in self.__dataclass_fields__:
            raw = record.get(role)
            if isinstance(raw, bytes):
                try:
                    total += getattr(self, role).positions(raw)
                except ValueError as error:
                    return BadSample(f"the {role} cannot be read: {error}")
        return total


def _check_positive(rule: ImageCost | AudioCost, role: str) -> None:
    for name, value in asdict(rule).items():
        if value < 1:
            raise ValueError(f"costs.{role}.{name} = {value} must be at least 1")
