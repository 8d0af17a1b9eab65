"""Codes of images and sounds, as a codec made them: int32 of shape (L,), row after row of their grid.

Their bytes are one of the number of dimensions, one of the bytes of a code (1, 2 or 4), the sizes as unsigned 32-bit
numbers, and the codes as unsigned numbers, row by row, all little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

import numpy as np

from millrace.core.config import option
from millrace.data.modalities.base import Modality

_MOST_DIMENSIONS = 4
_WIDTHS = (1, 2, 4)
_LIMIT = 2**31  # codes are int32 in batches


def pack(codes: np.ndarray) -> bytes:
    """The bytes of codes of any shape, from 0 to 2^31 - 1, each as narrow as the largest allows.

    Raises:
        ValueError: none, too many dimensions, or numbers that are no codes.
    """
    if not codes.size or not 1 <= codes.ndim <= _MOST_DIMENSIONS or codes.dtype.kind not in "iu":
        raise ValueError(f"{codes.dtype} of shape {codes.shape} are no codes")
    if codes.min() < 0 or codes.max() >= _LIMIT:
        raise ValueError(f"codes from {codes.min()} to {codes.max()}: they must be from 0 to {_LIMIT - 1}")
    width = np.min_scalar_type(codes.max()).itemsize
    sizes = np.array(codes.shape, "<u4").tobytes()
    return bytes([codes.ndim, width]) + sizes + codes.astype(f"<u{width}").tobytes()


def shape(raw: bytes) -> tuple[int, ...]:
    """The shape of packed codes, from their header.

    Raises:
        ValueError: why they are none.
    """
    dimensions, width = (raw[0], raw[1]) if len(raw) >= 2 else (0, 0)
    head = 2 + 4 * dimensions
    if not 1 <= dimensions <= _MOST_DIMENSIONS or width not in _WIDTHS or len(raw) < head:
        raise ValueError("not codes that `millrace prepare --codec` wrote")
    sizes = tuple(np.frombuffer(raw[2:head], "<u4").tolist())
    if (wanted := prod(sizes) * width) != len(raw) - head or not wanted:
        raise ValueError(f"{len(raw) - head} bytes of codes, its header says {wanted}")
    return sizes


def unpack(raw: bytes) -> np.ndarray:
    """Packed codes, int32 in their shape.

    Raises:
        ValueError: why they are none.
    """
    sizes = shape(raw)
    codes = np.frombuffer(raw, f"<u{raw[1]}", offset=2 + 4 * len(sizes))
    if codes.max() >= _LIMIT:
        raise ValueError(f"a code of {codes.max()}, more than {_LIMIT - 1}")
    return codes.astype(np.int32).reshape(sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class CodesCost:
    """A position for each code, and for the tag on each side of them."""

    def positions(self, raw: bytes) -> int:
        """Positions of packed codes; raises `ValueError` where their header cannot be read."""
        return prod(shape(raw)) + 2


@dataclass(frozen=True, kw_only=True, slots=True)
class CodesView:
    """Codes as they are."""

    count: ClassVar[int] = 1

    role: Literal["image_codes", "audio_codes"] = option("image_codes", "of which modality")
    name: str = option("", "what batches call them (default: the role)")

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.role)

    def make(self, value: np.ndarray, raw: bytes, random: np.random.Generator) -> np.ndarray:
        """The codes (L,)."""
        return value

    def blank(self) -> np.ndarray:
        """No codes."""
        return np.empty(0, np.int32)


class CodesModality(Modality):
    """Packed codes."""

    cost, view = CodesCost, CodesView

    def decode(self, raw: bytes) -> np.ndarray:
        return unpack(raw).ravel()

    def blank(self) -> np.ndarray:
        return np.empty(0, np.int32)
