"""Images: uint8 of shape (height, width, 3)."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, isqrt, log
from typing import Any, Literal

import numpy as np

from millrace.core.config import option
from millrace.data.decoders import image
from millrace.data.modalities.base import Modality

_RATIO = (3 / 4, 4 / 3)  # of the sides of a random crop, as in Inception's and torchvision's
_GREY = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageCost:
    """Patches of an image, one position each."""

    patch: int = option(16, "pixels on the side of a patch")
    most: int = option(1024, "positions of an image; a larger one is scaled down to at most so many")

    def __post_init__(self) -> None:
        for name in ("patch", "most"):
            if getattr(self, name) < 1:
                raise ValueError(f"costs.image.{name} = {getattr(self, name)} must be at least 1")

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

    def fitted(self, value: np.ndarray) -> np.ndarray:
        """An image (height, width, 3) resized to its grid: uint8 (rows * patch, columns * patch, 3)."""
        from PIL import Image

        columns, rows = self.grid(value.shape[1], value.shape[0])
        size = (columns * self.patch, rows * self.patch)
        if size == (value.shape[1], value.shape[0]):
            return value
        return np.array(Image.fromarray(value).resize(size, Image.Resampling.BICUBIC))

    def positions(self, raw: bytes) -> int:
        """Positions of an encoded image; raises `ValueError` where its header cannot be read."""
        width, height = image.size(raw)
        if width < 1 or height < 1:
            raise ValueError(f"its header says {width} x {height} pixels")
        columns, rows = self.grid(width, height)
        return columns * rows


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageView:
    """A square picture of an image, altered at random or not."""

    role: Literal["image"] = option("image", "of which modality")
    name: str = option("image", "what batches call it")
    count: int = option(1, "pictures of this kind; NAME0, NAME1, … where there are several")
    size: int = option(224, "pixels on each side")
    scale: list[float] = option(
        [1.0, 1.0], "share of the image's area that a random crop has, from and to; [1, 1]: its middle"
    )
    flip: bool = option(False, "left and right change places in half of them")
    shift: float = option(0.0, "moved by up to this share of the size, its border repeated")
    strength: float = option(0.0, "0 to 1: of two random changes of colour or shape, and of a patch that is cut out")

    def __post_init__(self) -> None:
        if self.size < 1 or self.count < 1:
            raise ValueError(f"size = {self.size} and count = {self.count} must be at least 1")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale = {self.scale}: give two shares, above 0 and at most 1, such as [0.4, 1.0]")
        if not 0 <= self.strength <= 1 or not 0 <= self.shift < 1:
            raise ValueError(f"strength = {self.strength} and shift = {self.shift} must be from 0 to 1")

    def make(self, value: np.ndarray, raw: bytes, random: np.random.Generator) -> np.ndarray:
        """Picture (size, size, 3) of an image (height, width, 3), uint8.

        Random crops are those of Inception (https://arxiv.org/abs/1409.4842, section 6), the strong changes those of
        RandAugment (https://arxiv.org/abs/1909.13719) with the cut of FixMatch (https://arxiv.org/abs/2001.07685).
        """
        from PIL import Image

        box = _crop(value.shape[1], value.shape[0], self.scale, random)
        if (box, value.shape[:2]) != ((0, 0, self.size, self.size), (self.size, self.size)):
            made = Image.fromarray(value).resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
            value = np.asarray(made)
        if self.flip and random.random() < 0.5:
            value = value[:, ::-1]
        if self.shift:
            value = _shift(value, round(self.shift * self.size), random)
        if self.strength:
            value = _alter(value, self.strength, random)
        return np.ascontiguousarray(value)

    def blank(self) -> np.ndarray:
        """A black picture."""
        return np.zeros((self.size, self.size, 3), np.uint8)


def _crop(width: int, height: int, scale: list[float], random: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a part of an image."""
    if scale == [1.0, 1.0]:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side
    area = width * height * random.uniform(scale[0], scale[1])
    ratio = exp(random.uniform(log(_RATIO[0]), log(_RATIO[1])))
    across, down = min(width, round((area * ratio) ** 0.5) or 1), min(height, round((area / ratio) ** 0.5) or 1)
    left, top = int(random.integers(0, width - across + 1)), int(random.integers(0, height - down + 1))
    return left, top, left + across, top + down


def _shift(value: np.ndarray, most: int, random: np.random.Generator) -> np.ndarray:
    size = value.shape[0]
    padded = np.pad(value, ((most, most), (most, most), (0, 0)), "edge")
    top, left = random.integers(0, 2 * most + 1, 2)
    return padded[top : top + size, left : left + size]


def _alter(value: np.ndarray, strength: float, random: np.random.Generator) -> np.ndarray:
    """Two of RandAugment's changes, and a grey square."""
    from PIL import Image

    made = Image.fromarray(np.ascontiguousarray(value))
    for number in random.integers(0, len(_CHANGES), 2).tolist():
        made = _CHANGES[number](made, strength * random.random(), 1 if random.random() < 0.5 else -1)
    value, size = np.array(made), value.shape[0]
    side = round(0.5 * strength * size * random.random())
    top, left = random.integers(0, size - side + 1, 2)
    value[top : top + side, left : left + side] = _GREY
    return value


def _enhanced(kind: str) -> Any:
    def change(made: Any, amount: float, sign: int) -> Any:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, kind)(made).enhance(1 + 0.9 * sign * amount)

    return change


def _operated(kind: str, *arguments: Any) -> Any:
    def change(made: Any, amount: float, sign: int) -> Any:
        from PIL import ImageOps

        return getattr(ImageOps, kind)(made, *(argument(amount) for argument in arguments))

    return change


def _moved(matrix: Any) -> Any:
    def change(made: Any, amount: float, sign: int) -> Any:
        from PIL import Image

        grey = (_GREY,) * 3
        values = matrix(sign * amount, made.size[0])
        return made.transform(made.size, Image.Transform.AFFINE, values, Image.Resampling.BILINEAR, fillcolor=grey)

    return change


def _rotated(made: Any, amount: float, sign: int) -> Any:
    from PIL import Image

    return made.rotate(sign * 30 * amount, Image.Resampling.BILINEAR, fillcolor=(_GREY,) * 3)


_CHANGES = (
    *map(_enhanced, ("Brightness", "Color", "Contrast", "Sharpness")),
    _operated("autocontrast"), _operated("equalize"),
    _operated("posterize", lambda amount: 8 - round(4 * amount)),
    _operated("solarize", lambda amount: round(256 * (1 - amount))),
    _moved(lambda amount, size: (1, 0.3 * amount, 0, 0, 1, 0)),
    _moved(lambda amount, size: (1, 0, 0, 0.3 * amount, 1, 0)),
    _moved(lambda amount, size: (1, 0, 0.3 * amount * size, 0, 1, 0)),
    _moved(lambda amount, size: (1, 0, 0, 0, 1, 0.3 * amount * size)),
    _rotated,
    lambda made, amount, sign: made,
)  # fmt: skip


class ImageModality(Modality):
    """Encoded images, as Pillow reads them."""

    cost, view = ImageCost, ImageView

    def decode(self, raw: bytes) -> np.ndarray:
        return image.decode(raw)

    def blank(self) -> np.ndarray:
        return np.zeros((1, 1, 3), np.uint8)
