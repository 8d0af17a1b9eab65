"""One vocabulary for everything that a decoder reads and writes: text, tags, and the codes of each modality.

Text and tags are the tokenizer's; behind it lie the codes of one modality after the other, as in Chameleon
(https://arxiv.org/abs/2405.09818, section 2) and Emu3 (https://arxiv.org/abs/2409.18869).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from millrace.core.errors import UserError

TEXT = "text"
NOTHING = "<|nothing|>"  # in the place of a prompt that was left out


def opening(modality: str) -> str:
    """The tag before a part."""
    return f"<|{modality}|>"


def closing(modality: str) -> str:
    """The tag behind a part."""
    return f"<|/{modality}|>"


def tags(modalities: Sequence[str]) -> list[str]:
    """Every tag that parts of `modalities` need; text stands without any, as in a model of text alone."""
    return [*(tag(modality) for modality in modalities for tag in (opening, closing)), NOTHING]


@dataclass(frozen=True)
class Vocabulary:
    """Which ids are what. Ids of text are [0, text); those of tags are among or behind them; codes come last."""

    text: int
    tags: dict[str, int]
    codes: dict[str, range]  # by modality, such as image and audio

    def __post_init__(self) -> None:
        missing = [tag for tag in tags(list(self.codes)) if tag not in self.tags]
        if missing:
            raise UserError(f"the vocabulary has no tag {', '.join(missing)}; the tokenizer must know it as a token")
        if len(set(self.tags.values())) < len(self.tags):
            raise UserError(f"two tags have the same id: {self.tags}")
        taken = 1 + max(self.text - 1, *self.tags.values())
        for modality, ids in sorted(self.codes.items(), key=lambda item: item[1].start):
            if not len(ids) or ids.start < taken:
                raise UserError(
                    f"codes of {modality} have the ids {ids.start} to {ids.stop - 1}, but ids below {taken} are "
                    "something else already; lay the codes behind the tokenizer's vocabulary, one modality after the "
                    "other"
                )
            taken = ids.stop

    @classmethod
    def lay_out(cls, text: int, tags: Mapping[str, int], counts: Mapping[str, int]) -> Vocabulary:
        """Codes of each modality, so many of them, one after the other behind text and tags."""
        first, codes = 1 + max(text - 1, *tags.values()), {}
        for modality, count in counts.items():
            codes[modality] = range(first, first + count)
            first += count
        return cls(text, dict(tags), codes)

    @property
    def size(self) -> int:
        """Ids that there are."""
        return (
            max(ids.stop for ids in self.codes.values()) if self.codes else 1 + max(self.text - 1, *self.tags.values())
        )

    @property
    def modalities(self) -> list[str]:
        """Text first."""
        return [TEXT, *self.codes]

    def check_fits(self, rows: int) -> None:
        """Refuse a model with fewer `rows` in its table of embeddings.

        Raises:
            UserError: what does not fit.
        """
        if rows < self.size:
            parts = ", ".join(f"{len(ids):,} codes of {modality}" for modality, ids in self.codes.items())
            raise UserError(
                f"text and tags take {self.size - sum(map(len, self.codes.values())):,} ids, and with {parts} that is "
                f"{self.size:,}, but the model has {rows:,}; raise model.config.vocab_size, or leave it out"
            )

    def segment(self, modality: str) -> range:
        """The ids of a part's content, without its tags."""
        return range(self.text) if modality == TEXT else self.codes[modality]

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        codes = {modality: [ids.start, ids.stop] for modality, ids in self.codes.items()}
        return {"text": self.text, "tags": self.tags, "codes": codes}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Vocabulary:
        """What `to_dict` gave."""
        codes = {modality: range(*borders) for modality, borders in table["codes"].items()}
        return cls(table["text"], dict(table["tags"]), codes)
