"""Documents for the rows that a rank will build: read and tokenised ahead in threads, dropped after their last use.

Nothing here depends on how many ranks there are: a rank asks for the documents of its own rows only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from millrace.core.errors import UserError
from millrace.data.config import DataConfig
from millrace.data.corpus import TEXT, Corpus
from millrace.data.costs import Costs
from millrace.data.index import ascending
from millrace.data.modalities.base import View, modality, names
from millrace.data.order import row_seeds
from millrace.data.parts import Encoded, Medium, Part, build_part, join_parts, tokens_part
from millrace.data.readahead import read_ahead
from millrace.data.reader import ShardReader
from millrace.data.tokenizer import Tokenizer

_READ_TOGETHER = 1024  # samples that all threads read at a time
_TURNS = 4  # of each thread in decoding a batch: few, for waking a thread costs as much as a small image


class _Shelf:
    """Samples that were announced for a window, and how often they will still be taken."""

    def __init__(self, samples: np.ndarray, uses: int, reads: Sequence[Callable[[], Part]]) -> None:
        """`samples`: unique, ascending; `reads` give parts of them, in their order."""
        self.samples, self.uses = samples, uses
        self._reads = reads

    @cached_property
    def part(self) -> Part:
        """All of it; waits, and raises what reading raised."""
        part = join_parts([read() for read in self._reads])
        self._reads = ()
        return part


@dataclass(frozen=True)
class Taken:
    """Documents: number n is `tokens[starts[n] : starts[n] + lengths[n]]` with `media[n]`, where it is `good`.

    [BOS] media text [EOS]: int32, as many as its cost and one more, with [EOS] at the positions of media.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    good: np.ndarray
    media: dict[int, tuple[Medium, ...]]


@dataclass(frozen=True)
class Looks:
    """What is taken of the media of whole samples: views by modality, or the media themselves where there is none.

    `seed` is the stream's.
    """

    views: Mapping[str, Sequence[View]]
    seed: int

    @classmethod
    def of(cls, config: DataConfig, seed: int) -> Looks | None:
        """None for samples that are packed."""
        return cls(config.views_by_role(), seed) if config.rows == "samples" else None

    def blanks(self, roles: Sequence[str]) -> dict[str, np.ndarray]:
        """What stands for samples without them in the place of all that is taken of media of these roles, by name."""
        if not self.views:
            return {role: modality(role).blank() for role in roles}
        return {name: view.blank() for role in roles for view in self.views.get(role, ()) for name in names(view)}


def bad_budget(corpus: Corpus, max_bad: int | None) -> int:
    """Samples that may be bad before it is an error (None: 0.1%, at least 10)."""
    return max(10, corpus.samples // 1000) if max_bad is None else max_bad


class Documents:
    """Documents of a corpus."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        max_bad: int | None = None,
        threads: int = 1,
        looks: Looks | None = None,
    ) -> None:
        """`max_bad`: as for `bad_budget`. `looks`: at samples that are not packed; media of others take positions."""
        self.reader = ShardReader(corpus)
        self.read_ahead = read_ahead(self.reader)
        self._threads, self._pool = threads, ThreadPoolExecutor(threads, thread_name_prefix="millrace-read")
        self._corpus, self._tokenizer = corpus, tokenizer
        self._costs = None if looks else Costs.stored(corpus.costs)
        self._budget = bad_budget(corpus, max_bad)
        self._looks = looks
        self.seen = looks.blanks(corpus.media) if looks else {}  # the last medium of each name, at first a blank
        self._shelves: dict[int, _Shelf] = {}
        self._bad: dict[int, str] = {}
        self._refused: dict[int, str] = {}
        self._news: list[dict[str, object]] = []

    @property
    def media(self) -> bool:
        """Whether documents have images or sounds."""
        return bool(self._corpus.media)

    @property
    def text(self) -> bool:
        """Whether any have text or tokens."""
        return bool(self._corpus.texts)

    def has_text(self, samples: np.ndarray) -> np.ndarray:
        """Whether each of `samples` has text or tokens, bool of shape (N,)."""
        return self._corpus.having(samples, TEXT)

    def expect(self, window: int, samples: np.ndarray) -> None:
        """Announce that each of `samples` (with repetitions) will be taken once for `window`; begin to read them."""
        if not len(samples):
            return
        unique = ascending(samples)
        together = -(-_READ_TOGETHER // self._threads)
        parts = np.split(unique, range(together, len(unique), together))
        self._shelves[window] = _Shelf(unique, len(samples), [self._begin(part) for part in parts])

    def _begin(self, samples: np.ndarray) -> Callable[[], Part]:
        """Begin to read; the result, when it is there.

        A single thread would only be waited for, and waking it costs: then the one that asks reads.
        """
        return self._pool.submit(self._read, samples).result if self._threads > 1 else partial(self._read, samples)

    def _read(self, samples: np.ndarray) -> Part:
        tokens = self.reader.tokens(samples)
        if tokens is not None and (part := tokens_part(tokens, self._tokenizer)):
            return part
        return build_part(self.reader.read(samples), self._tokenizer, self._costs)

    def take(self, window: int, samples: np.ndarray, costs: np.ndarray | None) -> Taken:
        """Documents of `samples`, announced for `window` before.

        `costs` are the planned costs (None: any length will do).

        Raises:
            UserError: more bad samples than the budget allows.
        """
        shelf = self._shelves[window]
        part, places = shelf.part, np.searchsorted(shelf.samples, samples)
        starts = part.offsets[places]
        lengths = part.offsets[places + 1] - starts
        good = (lengths > 0) if costs is None else (lengths - 1 == costs)
        media, broken = self._decode(window, shelf, places) if part.media else ({}, {})
        if unfit := self._bad.keys() | self._refused.keys() | {int(shelf.samples[place]) for place in broken}:
            good &= [sample not in unfit for sample in samples.tolist()]
        for number in () if good.all() else np.flatnonzero(~good).tolist():
            sample, place = int(samples[number]), int(places[number])
            why = self._refused.get(sample) or part.bad.get(place) or broken.get(place)
            planned = None if costs is None else costs[number]
            self._quarantine(sample, why or f"costs {lengths[number] - 1} positions, the manifest says {planned}")
        shelf.uses -= len(samples)
        if shelf.uses == 0:
            del self._shelves[window]
        found = {n: media[place] for n, place in enumerate(places.tolist()) if place in media} if media else {}
        self.seen |= {medium.role: medium.value for some in found.values() for medium in some}
        return Taken(part.tokens, starts, lengths, good, found)

    def _decode(
        self, window: int, shelf: _Shelf, places: np.ndarray
    ) -> tuple[dict[int, tuple[Medium, ...]], dict[int, str]]:
        """Media at `places`, decoded in threads, and why those at others cannot be."""
        found = shelf.part.media
        encoded = {place: found[place] for place in places.tolist() if place in found}
        samples, together = list(encoded.items()), -(-len(encoded) // (_TURNS * self._threads)) or 1
        runs = [samples[at : at + together] for at in range(0, len(samples), together)]
        decode, look = self._pool.map if self._threads > 1 else map, partial(self._look, window, shelf.samples)
        decoded = dict(zip(encoded, itertools.chain.from_iterable(decode(look, runs)), strict=True))
        media = {place: one for place, one in decoded.items() if not isinstance(one, str)}
        return media, {place: one for place, one in decoded.items() if isinstance(one, str)}

    def _look(
        self, window: int, numbers: np.ndarray, samples: Iterable[tuple[int, Iterable[Encoded]]]
    ) -> list[tuple[Medium, ...] | str]:
        """Media of samples (place in `numbers`, media), or views of them; or why there are none."""
        found: list[tuple[Medium, ...] | str] = []
        for place, media in samples:
            try:
                if not self._looks or not self._looks.views:
                    found.append(tuple(medium.decode() for medium in media))
                    continue
                span = np.array([[numbers[place], 0, 0, 0, 0, window]])
                seed = int(row_seeds([span], self._looks.seed)[0])
                views = (medium.views(self._looks.views.get(medium.role, ()), seed) for medium in media)
                found.append(tuple(itertools.chain.from_iterable(views)))
            except ValueError as error:
                found.append(str(error))
        return found

    def close(self) -> None:
        """End the threads; what is still being read is waited for."""
        if self.read_ahead:
            self.read_ahead.close()
        self._pool.shutdown(cancel_futures=True)

    def news(self) -> list[dict[str, object]]:
        """Quarantine entries {sample, shard, why} since the last call."""
        news, self._news = self._news, []
        return news

    def exclude(self, bad: Mapping[int, str]) -> None:
        """Use no sample of `bad` (sample → why) from now on, readable or not, and make no entry of it again.

        Raises:
            UserError: more bad samples than the budget allows.
        """
        self._bad |= bad
        self._check_budget()

    def refuse(self, samples: np.ndarray, why: str) -> None:
        """Count `samples` as bad when they are taken, whatever they hold."""
        self._refused |= dict.fromkeys(samples.tolist(), why)

    def _quarantine(self, sample: int, why: str) -> None:
        if sample in self._bad:
            return
        self._bad[sample] = why
        self._news.append({"sample": sample, "shard": self._corpus.shard_url(sample), "why": why})
        self._check_budget()

    def _check_budget(self) -> None:
        if len(self._bad) > self._budget:
            sample, why = list(self._bad.items())[-1]
            raise UserError(
                f"{len(self._bad)} samples could not be used, more than data.max_bad_samples = {self._budget}"
                f" allows; last: sample {sample} of {self._corpus.shard_url(sample)}: {why}. Prepare the data again, "
                "or raise data.max_bad_samples"
            )
