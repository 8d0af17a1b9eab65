"""Rows of a decoder that reads and writes several modalities: which parts, in which order, and what each counts for.

A row is BOS, the parts of its template, EOS. A part of text are tokens, another the codes of an image or a sound
between their tags. So a row of text alone is what it is in a model of text, and a row has no more positions than BOS,
the text, and two beside the codes of each other part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from millrace.core.errors import UserError
from millrace.models.vocabulary import NOTHING, TEXT, Vocabulary, closing, opening

ROLES = ("answer", "prompt")
Parts = Mapping[str, np.ndarray]  # content by modality: ids of text, or codes from 0


@dataclass(frozen=True)
class Template:
    """Modalities of the prompt and of the answer, and how often this template is taken beside others."""

    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    weight: float = 1.0

    @property
    def parts(self) -> tuple[str, ...]:
        """All in order."""
        return self.prompt + self.answer

    @property
    def row(self) -> str:
        """As it is written in a configuration."""
        return " ".join([*self.prompt, *([">"] if self.prompt else []), *self.answer])

    @classmethod
    def parse(cls, row: str, weight: float = 1.0) -> Template:
        """Of `PROMPT > ANSWER`, or `ANSWER`, each modalities between spaces.

        Raises:
            UserError: no answer, a modality twice, a weight that is not above 0.
        """
        prompt, arrow, answer = row.rpartition(">")
        made = cls(tuple(prompt.split()), tuple(answer.split()), weight)
        names = made.parts
        if not made.answer or (arrow and not made.prompt) or len(set(names)) < len(names) or ">" in prompt:
            raise UserError(
                f"the row '{row}': name each modality once, those that are given before a '>', such as 'image > text', "
                "or 'text' alone"
            )
        if not weight > 0:
            raise UserError(f"the row '{row}' has the weight {weight}; give a number above 0, or leave the row out")
        return made


@dataclass(frozen=True)
class Emphasis:
    """By how much the loss of a target counts: `prompt` for those of a prompt, 1 for others, times its modality's."""

    prompt: float
    modalities: Mapping[str, float]

    def of(self, modality: str, role: str) -> float:
        """Of a target of a part."""
        return self.modalities.get(modality, 1.0) * (self.prompt if role == "prompt" else 1.0)


@dataclass(frozen=True)
class Row:
    """Tokens (n + 1,), and of the targets, which are all but the first, (n,): what they count for, and their kind.

    A kind is the place of a (modality, role) in `kinds`; what is no target has the share 0.
    """

    tokens: np.ndarray
    shares: np.ndarray
    kinds: np.ndarray


def kinds(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """(modality, role) of targets."""
    return [(modality, role) for modality in vocabulary.modalities for role in ROLES]


def choose(templates: Sequence[Template], parts: Parts, random: np.random.Generator) -> Template | None:
    """One by weight among the templates whose parts a sample has, or none; `random` is drawn from once."""
    fitting = [template for template in templates if all(len(parts.get(name, ())) for name in template.parts)]
    at = random.random() * sum(template.weight for template in fitting)
    for template in fitting:
        at -= template.weight
        if at < 0:
            return template
    return fitting[-1] if fitting else None


class Layout:
    """Lays parts out as rows of at most `longest` positions."""

    def __init__(self, vocabulary: Vocabulary, borders: tuple[int, int], emphasis: Emphasis, longest: int) -> None:
        """`borders` are the ids of BOS and EOS."""
        self.vocabulary, self.longest = vocabulary, longest
        self._bos, self._eos, self._emphasis = *borders, emphasis
        self._kinds = {kind: number for number, kind in enumerate(kinds(vocabulary))}

    def part(self, modality: str, content: np.ndarray) -> np.ndarray:
        """The content's ids; between their tags, but for text."""
        if modality == TEXT:
            return content.astype(np.int64)
        known, first = self.vocabulary.tags, self.vocabulary.segment(modality).start
        return np.concatenate(
            [[known[opening(modality)]], content.astype(np.int64) + first, [known[closing(modality)]]]
        )

    def prompt(self, parts: Sequence[tuple[str, np.ndarray]], to: str) -> np.ndarray:
        """What an answer follows: what is given, or without anything <|nothing|>, and the answer's opening tag."""
        known = self.vocabulary.tags
        given = [self.part(name, content) for name, content in parts] or [np.array([known[NOTHING]])]
        return np.concatenate([[self._bos], *given, [] if to == TEXT else [known[opening(to)]]]).astype(np.int64)

    def row(self, template: Template, parts: Parts, *, dropped: bool = False) -> Row:
        """A row; with `dropped` <|nothing|> stands in the place of its prompt.

        Text is cut at its end where the row would be longer than `longest`.

        Raises:
            UserError: it is too long without any text.
        """
        shown = template.answer if dropped else template.parts
        parts = self._fitting(template, {name: parts[name] for name in shown}, dropped=dropped)
        pieces, shares, which = [], [], []
        if dropped:
            pieces, shares, which = [np.array([self.vocabulary.tags[NOTHING]])], [np.zeros(1)], [np.zeros(1, np.int64)]
        for name, content in parts.items():
            role = "answer" if name in template.answer else "prompt"
            piece = self.part(name, content)
            if name == shown[-1]:
                piece = np.append(piece, self._eos)
            pieces.append(piece)
            shares.append(np.full(len(piece), self._emphasis.of(name, role)))
            which.append(np.full(len(piece), self._kinds[name, role]))
        return Row(np.concatenate([[self._bos], *pieces]), np.concatenate(shares), np.concatenate(which))

    def text(self, inputs: np.ndarray, labels: np.ndarray) -> Row:
        """A row of a document of text, or of a piece of one, that was laid out already; labels may be missing (< 0)."""
        shares = np.where(labels >= 0, self._emphasis.of(TEXT, "answer"), 0.0)
        return Row(np.append(inputs, labels[-1:]), shares, np.full(len(labels), self._kinds[TEXT, "answer"]))

    def _fitting(self, template: Template, parts: dict[str, np.ndarray], *, dropped: bool) -> dict[str, np.ndarray]:
        length = 1 + dropped + sum(len(content) + 2 * (name != TEXT) for name, content in parts.items())
        over = length - self.longest
        if over <= 0:
            return parts
        text = parts.get(TEXT, np.empty(0, np.int64))
        if over > len(text):
            raise UserError(
                f"a row '{template.row}' has {length - len(text):,} positions without its text, more than "
                f"data.sequence_length = {self.longest:,}; raise that"
            )
        return parts | {TEXT: text[: len(text) - over]}
