"""Documents for the rows that a rank will build: read ahead in threads, decoded on first use, dropped after the last.

Nothing here depends on how many ranks there are: a rank asks for the documents of its own rows only.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from millrace.core.errors import UserError
from millrace.core.registry import lookup
from millrace.data import DECODERS
from millrace.data.corpus import Corpus
from millrace.data.costs import Costs
from millrace.data.reader import ShardReader
from millrace.data.sources.base import BadSample, Content, Record
from millrace.data.sources.values import without_borders
from millrace.data.tokenizer import Tokenizer

_READ_TOGETHER = 64  # samples that a thread reads at a time


@dataclass(frozen=True, slots=True)
class Medium:
    """A decoded image, uint8 (height, width, 3), or sound, float32 (frames,), and the positions that stand for it."""

    role: str
    value: np.ndarray
    start: int
    positions: int


@dataclass(frozen=True, slots=True)
class Document:
    """[BOS] media text [EOS]: int32 of shape (cost + 1,), with [EOS] at the positions of media."""

    tokens: np.ndarray
    media: tuple[Medium, ...] = ()

    @property
    def text(self) -> int:
        """Where the text begins in `tokens`."""
        return 1 + sum(medium.positions for medium in self.media)


@dataclass
class _Held:
    content: Future[dict[int, Content]] | Document | BadSample
    uses: int


class Documents:
    """Documents of a corpus."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, max_bad: int | None = None, threads: int = 1) -> None:
        """`max_bad`: samples that may be bad before it is an error (None: 0.1%, at least 10)."""
        self.reader = ShardReader(corpus)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="millrace-read")
        self._corpus, self._tokenizer = corpus, tokenizer
        self._costs = Costs.stored(corpus.costs)
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
            reading = self._pool.submit(self.reader.read, part)
            self._held |= {sample: _Held(reading, 0) for sample in part.tolist()}
        for sample, count in zip(unique.tolist(), uses.tolist(), strict=True):
            self._held[sample].uses += count

    def take(self, samples: np.ndarray, costs: np.ndarray | None) -> dict[int, Document | None]:
        """Documents of `samples`, announced before; None for a bad one.

        `costs` are the planned costs (None: any length will do).

        Raises:
            UserError: more bad samples than the budget allows.
        """
        self._decode(np.unique(samples).tolist())
        taken: dict[int, Document | None] = {}
        for number, sample in enumerate(samples.tolist()):
            held = self._held[sample]
            why = self._bad.get(sample) or self._refused.get(sample)
            document = BadSample(why) if why else held.content
            if isinstance(document, Document) and costs is not None and len(document.tokens) - 1 != costs[number]:
                document = BadSample(f"costs {len(document.tokens) - 1} positions, the manifest says {costs[number]}")
            if isinstance(document, BadSample):
                self._quarantine(sample, document.why)
            taken[sample] = document if isinstance(document, Document) else None
            held.uses -= 1
            if held.uses == 0:
                del self._held[sample]
        return taken

    def close(self) -> None:
        """End the threads; what is still being read is waited for."""
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

    def _decode(self, samples: list[int]) -> None:
        """Decode what was only read so far: media in threads, all texts together."""
        records: dict[int, Record] = {}
        for sample in samples:
            held = self._held[sample]
            if isinstance(held.content, Future):
                content = held.content.result()[sample]
                if isinstance(content, BadSample):
                    held.content = content
                else:
                    records[sample] = content
        if not records:
            return
        texts = [str(record.get("text", "")) for record in records.values() if "tokens" not in record]
        encoded = iter(self._tokenizer.encode(texts))
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        ids = [
            without_borders(np.asarray(r["tokens"]), bos, eos) if "tokens" in r else next(encoded)
            for r in records.values()
        ]
        media = self._pool.map(_media, records.values()) if self._corpus.media else ({} for _ in records)
        for sample, text, decoded in zip(records, ids, media, strict=True):
            self._held[sample].content = decoded if isinstance(decoded, BadSample) else self._document(text, decoded)

    def _document(self, ids: np.ndarray, decoded: Mapping[str, tuple[np.ndarray, bytes]]) -> Document | BadSample:
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self._tokenizer.vocab_size):
            return BadSample(f"token {ids.max()} is outside the vocabulary of {self._tokenizer.vocab_size}")
        media, at = [], 1
        for role, (value, raw) in decoded.items():
            positions = getattr(self._costs, role).positions(raw)
            media.append(Medium(role, value, at, positions))
            at += positions
        tokens = np.full(at + len(ids) + 1, self._tokenizer.eos_id, np.int32)
        tokens[0], tokens[at:-1] = self._tokenizer.bos_id, ids
        return Document(tokens, tuple(media))

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


def _media(record: Record) -> dict[str, tuple[np.ndarray, bytes]] | BadSample:
    """Decoded media of a record and their encoded form, by role."""
    found = {}
    for role, decoder in DECODERS.items():
        raw = record.get(role)
        if isinstance(raw, bytes):
            try:
                found[role] = lookup({role: decoder}, role, "decoder")(raw), raw
            except ValueError as error:
                return BadSample(f"the {role} cannot be decoded: {error}")
    return found
