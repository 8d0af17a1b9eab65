"""The mixture: which sample stands at which place of the stream, over sources, weights and stages.

A mixture block of `BLOCK` places holds an exact number of samples of each component, spread evenly; so how many samples
of a component were drawn before any place is known in closed form, and every component is passed through in its own
`Order`, epoch by epoch. A stage changes the numbers at a window border; components go on where they stood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from millrace.core.errors import UserError, did_you_mean
from millrace.data.config import Weights
from millrace.data.corpus import Corpus, Source
from millrace.data.order import Growth, Order, derive_key
from millrace.data.state import Stage

BLOCK = 1 << 16
ALL = "*"  # the one component of a stream without weights: all sources, in proportion to what they hold


def components(corpus: Corpus, weighted: bool) -> dict[str, Source | None]:
    """Components by name: every source of the corpus, or all of them together."""
    return {source.name: source for source in corpus.sources()} if weighted else {ALL: None}


def counts(weights: Weights, sources: Sequence[Source]) -> tuple[int, ...]:
    """Samples of each source in a mixture block, so that the tokens have the wanted shares.

    Sums to `BLOCK` by largest remainder; a source with a share above 0 has at least one.

    Raises:
        UserError: a name that no source has, a source without a weight, or no weight above 0.
    """
    shares = _shares(weights, sources)
    if not shares.sum() > 0:
        raise UserError("data.mixture leaves every source out; give one of them a weight above 0")
    per_sample = np.array([max(s.tokens or s.bytes, 1) / max(s.samples, 1) for s in sources])
    wanted = shares / per_sample
    wanted *= BLOCK / wanted.sum()
    found = np.maximum(np.floor(wanted), wanted > 0).astype(np.int64)
    while (missing := BLOCK - int(found.sum())) > 0:
        found[np.argsort(found - wanted, kind="stable")[:missing]] += 1
    while found.sum() > BLOCK:
        found[np.argmax(np.where(found > 1, found - wanted, -np.inf))] -= 1
    return tuple(found.tolist())


def _shares(weights: Weights, sources: Sequence[Source]) -> np.ndarray:
    size = np.array([s.tokens or s.bytes for s in sources], np.float64)
    if weights.temperature is not None:
        return np.asarray(size ** (1 / weights.temperature))
    if weights.epochs:
        return np.asarray(_named("epochs", weights.epochs, sources) * size)
    if weights.tokens:
        return _named("tokens", weights.tokens, sources)
    return _named("weights", weights.weights, sources)


def _named(key: str, given: Mapping[str, float], sources: Sequence[Source]) -> np.ndarray:
    names = [source.name for source in sources]
    for name in given:
        if name not in names:
            raise UserError(
                f"data.mixture.{key} names '{name}', which no source is called"
                f"{did_you_mean(name, names) or '; there are: ' + ', '.join(names)}"
            )
    for name in names:
        if name not in given:
            raise UserError(f"data.mixture.{key} says nothing of the source '{name}'; write {name} = 0 to leave it out")
    return np.array([given[name] for name in names], np.float64)


@dataclass(frozen=True)
class _Spread:
    """A mixture block: the component at each place, and how many of it stand before that place."""

    which: np.ndarray
    before: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, counts: Sequence[int]) -> _Spread:
        which = np.repeat(np.arange(len(counts)), counts)
        before = np.concatenate([np.arange(n) for n in counts])
        place = np.concatenate([(np.arange(n) + 0.5) / n for n in counts if n])
        order = np.lexsort((which, place))
        return cls(which[order], before[order], np.array(counts, np.int64))

    def drawn(self, places: int) -> np.ndarray:
        """Samples of each component in the first `places` places."""
        blocks, rest = divmod(places, len(self.which))
        return blocks * self.counts + np.bincount(self.which[:rest], minlength=len(self.counts))


class Mixture:
    """Samples of any window, from the stages alone."""

    def __init__(self, corpus: Corpus, parts: Mapping[str, Source | None], seed: int) -> None:
        self.corpus, self._parts, self._seed = corpus, list(parts.values()), seed
        self._stages: tuple[Stage, ...] = ()

    def samples(self, stages: tuple[Stage, ...], start: int, stop: int) -> np.ndarray:
        """Samples at places [start, stop) of the last stage, int64 of shape (stop - start,).

        A place counts the samples since that stage began.
        """
        if stages != self._stages:
            self._build(stages)
        places = np.arange(start, stop)
        blocks, rest = np.divmod(places, len(self._spread.which))
        which = self._spread.which[rest]
        at = self._began[which] + blocks * self._spread.counts[which] + self._spread.before[rest]
        out = np.empty(len(places), np.int64)
        for part in np.unique(which).tolist():
            here = np.flatnonzero(which == part)  # consecutive draws of that component
            out[here] = self._orders[part].samples(int(at[here[0]]), int(at[here[-1]]) + 1)
        return out

    def _build(self, stages: tuple[Stage, ...]) -> None:
        drawn = np.zeros(len(self._parts), np.int64)
        growth: list[list[Growth]] = [[] for _ in self._parts]
        for number, stage in enumerate(stages):
            for part, source in enumerate(self._parts):
                self._grow(growth[part], int(drawn[part]), stage, source)
            self._spread, self._began = _Spread.of(stage.counts), drawn[: len(stage.counts)].copy()
            if number + 1 < len(stages):
                places = (stages[number + 1].start_window - stage.start_window) * stage.window
                drawn[: len(stage.counts)] += self._spread.drawn(places)
        seeds = [derive_key(self._seed, part) if part else self._seed for part in range(len(self._parts))]
        mixed = stages[-1].shuffle_blocks
        self._orders = [Order(grown, seed, mixed) if grown else None for grown, seed in zip(growth, seeds, strict=True)]
        self._stages = stages

    def _grow(self, growth: list[Growth], position: int, stage: Stage, source: Source | None) -> None:
        blocks = self.corpus.blocks(stage.manifests, source)
        known = np.concatenate([g.blocks.firsts for g in growth]) if growth else np.empty(0, np.int64)
        if len(known) < len(blocks):
            new = ~np.isin(blocks.firsts, known)
            growth.append(Growth(position, type(blocks)(blocks.firsts[new], blocks.sizes[new])))
