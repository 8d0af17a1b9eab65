"""Documents for the rows that a rank will build: read and tokenised ahead in threads, dropped after their last use.

Nothing here depends on how many ranks there are: a rank asks for the documents of its own rows only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from millrace.core.errors import UserError
from millrace.data.corpus import Corpus
from millrace.data.costs import Costs
from millrace.data.parts import Document, Encoded, Medium, Part, build_part
from millrace.data.readahead import read_ahead
from millrace.data.reader import ShardReader
from millrace.data.tokenizer import Tokenizer

_READ_TOGETHER = 256  # samples that a thread reads at a time


class _Held:
    """Sample number `place` of a part, and how often it will still be taken."""

    __slots__ = ("place", "reading", "uses")

    def __init__(self, reading: _Reading, place: int) -> None:
        self.reading, self.place, self.uses = reading, place, 0


class _Reading:
    """A part that a thread reads."""

    def __init__(self, future: Future[Part]) -> None:
        self._future: Future[Part] | None = future
        self._part: Part | None = None

    def part(self) -> Part:
        """Wait for it; raises what the thread raised."""
        if self._part is None:
            assert self._future is not None
            self._part, self._future = self._future.result(), None
        return self._part


class Documents:
    """Documents of a corpus."""

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, max_bad: int | None = None, threads: int = 1, packed: bool = True
    ) -> None:
        """`max_bad`: samples that may be bad before it is an error (None: 0.1%, at least 10).

        Media take positions only where documents are `packed`.
        """
        self.reader = ShardReader(corpus)
        self.read_ahead = read_ahead(self.reader)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="millrace-read")
        self._corpus, self._tokenizer = corpus, tokenizer
        self._costs = Costs.stored(corpus.costs) if packed else None
        self._budget = max(10, corpus.samples // 1000) if max_bad is None else max_bad
        self._held: dict[int, _Held] = {}
        self._bad: dict[int, str] = {}
        self._refused: dict[int, str] = {}
        self._news: list[dict[str, object]] = []

    def expect(self, samples: np.ndarray) -> None:
        """Announce that each of `samples` (with repetitions) will be taken once; begin to read the new ones."""
        unique, uses = np.unique(samples, return_counts=True)
        new = unique[[sample not in self._held for sample in unique.tolist()]]
        for part in np.split(new, range(_READ_TOGETHER, len(new), _READ_TOGETHER)):
            reading = _Reading(self._pool.submit(self._read, part))
            self._held |= {sample: _Held(reading, place) for place, sample in enumerate(part.tolist())}
        for sample, count in zip(unique.tolist(), uses.tolist(), strict=True):
            self._held[sample].uses += count

    def _read(self, samples: np.ndarray) -> Part:
        contents = self.reader.read(samples)
        return build_part([contents[sample] for sample in samples.tolist()], self._tokenizer, self._costs)

    def take(self, samples: np.ndarray, costs: np.ndarray | None) -> dict[int, Document | None]:
        """Documents of `samples`, announced before; None for a bad one.

        `costs` are the planned costs (None: any length will do).

        Raises:
            UserError: more bad samples than the budget allows.
        """
        numbers = samples.tolist()
        media, broken = self._decode(dict.fromkeys(numbers)) if self._corpus.media else ({}, {})
        taken: dict[int, Document | None] = {}
        for sample, cost in zip(numbers, numbers if costs is None else costs.tolist(), strict=True):
            held = self._held[sample]
            if sample not in taken:
                part = held.reading.part()
                tokens = part.document(held.place)
                why = self._bad.get(sample) or self._refused.get(sample) or part.bad.get(held.place)
                why = why or broken.get(sample)
                if not why and costs is not None and len(tokens) - 1 != cost:
                    why = f"costs {len(tokens) - 1} positions, the manifest says {cost}"
                if why:
                    self._quarantine(sample, why)
                taken[sample] = None if why else Document(tokens, media.get(sample, ()))
            held.uses -= 1
            if held.uses == 0:
                del self._held[sample]
        return taken

    def _decode(self, samples: Iterable[int]) -> tuple[dict[int, tuple[Medium, ...]], dict[int, str]]:
        """Media of `samples`, decoded in threads, and why those of others cannot be."""
        encoded: dict[int, list[Encoded]] = {}
        for sample in samples:
            held = self._held[sample]
            if found := held.reading.part().media.get(held.place):
                encoded[sample] = found
        decoded = dict(zip(encoded, self._pool.map(_decode, encoded.values()), strict=True))
        media = {sample: one for sample, one in decoded.items() if not isinstance(one, str)}
        return media, {sample: one for sample, one in decoded.items() if isinstance(one, str)}

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
                f" allows; last: sample {sample} of {self._corpus.shard_url(sample)}: {why}. Prepare data again, "
                "or raise it"
            )


def _decode(media: Iterable[Encoded]) -> tuple[Medium, ...] | str:
    try:
        return tuple(medium.decode() for medium in media)
    except ValueError as error:
        return str(error)
