"""Samples that were read together, as documents: [BOS] media text [EOS] of each, end to end in one array."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from millrace.data import MODALITIES
from millrace.data.costs import Costs
from millrace.data.modalities.base import View, modality, names
from millrace.data.sources.base import BadSample, Content, Record
from millrace.data.sources.values import without_borders
from millrace.data.tokenizer import Tokenizer


class Medium(NamedTuple):
    """What was decoded, an image uint8 (height, width, 3) or a sound float32 (frames,), say, or a view of it, and the
    positions that stand for it."""

    role: str
    value: np.ndarray
    start: int
    positions: int


class Encoded(NamedTuple):
    """A medium before it is decoded."""

    role: str
    raw: bytes
    start: int
    positions: int

    def decode(self) -> Medium:
        """Decode it.

        Raises:
            ValueError: why it cannot be decoded.
        """
        try:
            value = modality(self.role).decode(self.raw)
        except ValueError as error:
            raise ValueError(f"the {self.role} cannot be decoded: {error}") from None
        return Medium(self.role, value, self.start, self.positions)

    def views(self, wanted: Sequence[View], seed: int) -> Iterator[Medium]:
        """Decode it, and look at it in the ways of its modality that are `wanted`, all that is random from `seed`.

        Raises:
            ValueError: why it cannot be decoded, or looked at.
        """
        whole, random = self.decode(), np.random.default_rng(seed)
        for view in wanted:
            for name in names(view):
                yield Medium(name, view.make(whole.value, self.raw, random), self.start, self.positions)


@dataclass
class Part:
    """Document i is `tokens[offsets[i] : offsets[i + 1]]`, int32, with `media[i]`, or `bad[i]` says why it is none."""

    tokens: np.ndarray
    offsets: np.ndarray
    media: dict[int, list[Encoded]] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)


def join_parts(parts: Sequence[Part]) -> Part:
    """One part of the documents of all."""
    if len(parts) == 1:
        return parts[0]
    joined = Part(np.concatenate([part.tokens for part in parts]), np.zeros(1, np.int64))
    for part in parts:
        first = len(joined.offsets) - 1
        joined.offsets = np.concatenate([joined.offsets, joined.offsets[-1] + part.offsets[1:]])
        joined.media |= {first + number: media for number, media in part.media.items()}
        joined.bad |= {first + number: why for number, why in part.bad.items()}
    return joined


def build_part(contents: Sequence[Content], tokenizer: Tokenizer, costs: Costs | None) -> Part:
    """Tokenise what is text, and lay the documents end to end; a bad one has no tokens.

    Without `costs` media take no positions.
    """
    part = Part(np.empty(0, np.int32), np.zeros(len(contents) + 1, np.int64), bad=_bad(contents))
    good = {number: one for number, one in enumerate(contents) if not isinstance(one, BadSample)}
    heads, texts = np.ones(len(contents), np.int64), {}
    for (number, record), ids in zip(good.items(), _ids(list(good.values()), tokenizer), strict=True):
        try:
            if isinstance(ids, BadSample):
                raise ValueError(ids.why)
            if roles := [role for role in MODALITIES if role in record]:
                part.media[number] = list(_media(record, roles, costs))
                heads[number] += sum(medium.positions for medium in part.media[number])
        except ValueError as error:
            part.bad[number] = str(error)
        else:
            texts[number] = ids
    if texts:
        numbers = np.fromiter(texts, np.int64)
        part.offsets[numbers + 1] = heads[numbers] + [len(ids) + 1 for ids in texts.values()]
        part.offsets = part.offsets.cumsum()
        starts, stops = part.offsets[numbers], part.offsets[numbers + 1]
        part.tokens = np.full(stops[-1], tokenizer.eos_id, np.int32)
        part.tokens[starts] = tokenizer.bos_id
        is_text = np.ones(stops[-1], bool)
        is_text[starts] = is_text[stops - 1] = False
        for number in part.media:
            is_text[part.offsets[number] :][: heads[number]] = False
        part.tokens[is_text] = np.concatenate(list(texts.values()))
    return part


def tokens_part(tokens: Sequence[np.ndarray], tokenizer: Tokenizer) -> Part | None:
    """As `build_part` of records that hold `tokens` alone; None where one has borders or ids that are not known."""
    joined, lengths = np.concatenate(tokens), np.fromiter(map(len, tokens), np.int64, len(tokens))
    ends = lengths.cumsum()
    starts, stops = (ends - lengths)[lengths > 0], ends[lengths > 0]
    if (joined[starts] == tokenizer.bos_id).any() or (joined[stops - 1] == tokenizer.eos_id).any():
        return None
    if len(joined) and not (joined.min() >= 0 and joined.max() < tokenizer.vocab_size):
        return None
    part = Part(np.full(len(joined) + 2 * len(tokens), tokenizer.eos_id, np.int32), np.zeros(len(tokens) + 1, np.int64))
    part.offsets[1:] = ends + 2 * np.arange(1, len(tokens) + 1)
    is_text = np.ones(len(part.tokens), bool)
    is_text[part.offsets[:-1]] = is_text[part.offsets[1:] - 1] = False
    part.tokens[is_text] = joined
    part.tokens[part.offsets[:-1]] = tokenizer.bos_id
    return part


def _bad(contents: Sequence[Content]) -> dict[int, str]:
    return {number: one.why for number, one in enumerate(contents) if isinstance(one, BadSample)}


def _ids(records: Sequence[Record], tokenizer: Tokenizer) -> Sequence[np.ndarray | BadSample]:
    """Token ids of the texts, none where there is no text, or those that are there already."""
    given = iter(_given([np.asarray(record["tokens"]) for record in records if "tokens" in record], tokenizer))
    texts = [str(record.get("text", "")) for record in records if "tokens" not in record]
    made = iter(tokenizer.encode_words(texts))
    return [next(given if "tokens" in record else made) for record in records]


def _given(given: list[np.ndarray], tokenizer: Tokenizer) -> Sequence[np.ndarray | BadSample]:
    """Token ids that are there already; borders that they have are left out."""
    if not given:
        return []
    joined = np.concatenate(given)
    ends = np.cumsum([len(ids) for ids in given])
    starts = np.concatenate([[0], ends[:-1]])[ends > np.concatenate([[0], ends[:-1]])]
    if (joined[starts] == tokenizer.bos_id).any() or (joined[ends[ends > 0] - 1] == tokenizer.eos_id).any():
        given = [without_borders(ids, tokenizer.bos_id, tokenizer.eos_id) for ids in given]
    if not len(joined) or (joined.min() >= 0 and joined.max() < tokenizer.vocab_size):
        return given
    return [_known(ids, tokenizer.vocab_size) for ids in given]


def _known(ids: np.ndarray, vocabulary: int) -> np.ndarray | BadSample:
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        return BadSample(f"token {ids.max()} is outside the vocabulary of {vocabulary}")
    return ids


def _media(record: Mapping[str, object], roles: Sequence[str], costs: Costs | None) -> Iterator[Encoded]:
    """Media of a record and where they stand; raises `ValueError` where a header cannot be read."""
    at = 1
    for role in roles:
        raw = record[role]
        assert isinstance(raw, bytes)
        try:
            positions = costs[role].positions(raw) if costs else 0
        except ValueError as error:
            raise ValueError(f"the {role} cannot be decoded: {error}") from None
        yield Encoded(role, raw, at, positions)
        at += positions
