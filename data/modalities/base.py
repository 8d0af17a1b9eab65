"""What a modality is. A new one is one file with a subclass, and one line in `millrace.data.MODALITIES`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any, ClassVar, Protocol

import numpy as np

from millrace.core.registry import lookup
from millrace.data import MODALITIES


class Rule(Protocol):
    """What a medium costs in positions of a sequence: a dataclass of a manifest, that belongs to its fingerprint."""

    def positions(self, raw: bytes) -> int:
        """Positions of an encoded medium, from its header; raises `ValueError` where that cannot be read."""
        ...


class View(Protocol):
    """A picture that a model gets of a medium: a dataclass of the configuration."""

    name: str  # under which batches hold it; with a count above 1, NAME0, NAME1, …
    count: int

    def make(self, value: np.ndarray, raw: bytes, random: np.random.Generator) -> np.ndarray:
        """From what was decoded; all that is random is drawn from `random`.

        Raises:
            ValueError: why there is none of this medium.
        """
        ...

    def blank(self) -> np.ndarray:
        """What stands in a batch for a sample without this medium: zeros, of the view's size or of none."""
        ...


class Modality(ABC):
    """How a medium is decoded, what it costs, and how it may be looked at."""

    cost: ClassVar[type[Any]]  # a `Rule`
    view: ClassVar[type[Any]]  # a `View`

    @abstractmethod
    def decode(self, raw: bytes) -> np.ndarray:
        """An array from an encoded medium.

        Raises:
            ValueError: why it cannot be decoded.
        """

    @abstractmethod
    def blank(self) -> np.ndarray:
        """What stands in a batch without any medium of the kind, where there are no views: the least of zeros."""


@cache
def modality(role: str) -> Modality:
    """The modality of a role.

    Raises:
        UserError: an unknown one.
    """
    found: Modality = lookup(MODALITIES, role, "modality")()
    return found


def names(view: View) -> list[str]:
    """Under which names a batch holds what `view` makes of a medium."""
    return [f"{view.name}{number}" for number in range(view.count)] if view.count > 1 else [view.name]
