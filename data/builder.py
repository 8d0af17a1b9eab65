"""A rank's part of every step, as arrays: opened from a `Spec`, in the rank's own process or in a worker's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from millrace.core.config import build, to_dict
from millrace.core.errors import UserError
from millrace.data.collate import cut_rows, pack_rows, stack_samples
from millrace.data.config import DataConfig
from millrace.data.corpus import Corpus
from millrace.data.documents import Documents, Looks
from millrace.data.frames import Frame
from millrace.data.mixture import Mixture, components, counts
from millrace.data.state import SAMPLES, LoaderState, Stage
from millrace.data.stream import Deal, Expecting, Planner, RowStream, Share, Step, Unread, window_samples
from millrace.data.tokenizer import Tokenizer, open_tokenizer

_TOGETHER = 2**16  # positions: steps of a rank are built together up to so many


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Everything that a rank's stream depends on, besides where it stands."""

    config: DataConfig
    seed: int
    deal: Deal

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"config": to_dict(self.config), "seed": self.seed, "deal": asdict(self.deal)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Spec:
        """Read what `to_json` gave."""
        return cls(config=build(DataConfig, plain["config"]), seed=plain["seed"], deal=Deal(**plain["deal"]))


class Opened:
    """A spec with its corpus and tokenizer opened, and what the stream was agreed to be.

    Raises:
        UserError: manifest, tokenizer or batch that do not fit, or a state of another stream.
    """

    def __init__(self, spec: Spec, state: LoaderState | None) -> None:
        config = spec.config
        self.spec = spec
        self.corpus = Corpus.load(config.manifest)
        self.tokenizer = open_tokenizer(self.corpus, config.tokenizer)
        self._parts = components(self.corpus, weighted=bool(config.mixture))
        # Shards that were appended must not change the windows of a stream that is under way.
        grown = state is not None and state.stages[0].manifests != self.corpus.fingerprints
        self._window = (
            state.stages[0].window if state is not None and grown else window_samples(self.corpus, config.window)
        )
        first = self.wanted(0, 0)
        if state is not None:
            state.check(first, spec.seed)
            for stage in state.stages:
                self.corpus.check(stage.manifests)
        self.state = state or LoaderState(spec.seed, (first,))
        for stage in (first, self.state.stages[-1]):
            check_batch(stage.batch, spec.deal.micro_batch, spec.deal.world)

    def wanted(self, steps: int, tokens: int) -> Stage:
        """The stage that the configuration asks for after so many steps and tokens."""
        config = self.spec.config
        weights = config.mixture.at(steps, tokens) if config.mixture else None
        return Stage(
            start_window=0,
            manifests=self.corpus.fingerprints,
            components=tuple(self._parts),
            counts=counts(weights, self.corpus.sources()) if weights else (1,),
            batch=self.spec.deal.batch_rows,
            sequence_length=SAMPLES if config.rows == "samples" else config.sequence_length,
            window=self._window,
            shuffle_blocks=config.shuffle_blocks,
            pack="alone" if config.rows == "alone" else config.pack,
        )

    def builder(self, share: Share | None = None) -> Builder:
        """What builds this rank's part, or a worker's share of it."""
        config = self.spec.config
        looks = Looks.of(config, self.spec.seed)
        documents = Documents(self.corpus, self.tokenizer, config.max_bad_samples, config.threads, looks)
        return Builder(self.stream(documents, share), documents, self.tokenizer, self.spec.seed)

    def stream(self, documents: Expecting, share: Share | None = None) -> RowStream:
        """The plan of the stream; `documents` hears what this rank will need."""
        planner = Planner(documents, Mixture(self.corpus, self._parts, self.spec.seed), self.spec.seed)
        return RowStream(planner, documents, self.spec.deal, self.wanted, share)

    def plan(self) -> RowStream:
        """The plan alone, from which nothing is read.

        Raises:
            UserError: the corpus has no token counts, without which documents must be read to be planned.
        """
        if not self.corpus.counted and self.spec.config.rows != "samples":
            raise UserError(
                f"{self.corpus.folder} has no token counts; prepare it with count_tokens to plan without reading"
            )
        return self.stream(Unread())


class Builder:
    """Builds the steps of a share one after the other."""

    def __init__(self, stream: RowStream, documents: Documents, tokenizer: Tokenizer, seed: int) -> None:
        self.documents, self._stream, self._tokenizer, self._seed = documents, stream, tokenizer, seed

    def steps(self, state: LoaderState) -> Iterator[tuple[Frame, LoaderState]]:
        """The steps after `state` that are the share's, without end, and the state after each.

        Short steps of one window are built together, which costs little more than one of them. No step waits for
        documents of a later window, nor for images and sounds of a later step.

        Raises:
            UserError: as `Documents.take`.
        """
        planned: list[Step] = []
        while True:
            if planned and not self._joins(planned, state):
                yield from self._build(planned)
                planned = []
            step = self._stream.step(state)
            if self._stream.share.mine(state.steps):
                planned.append(step)
            state = step.after

    def _joins(self, planned: Sequence[Step], state: LoaderState) -> bool:
        """Whether the step after `state` can be built together with those before."""
        size = sum(len(step.rows) for step in planned) // self._stream.deal.world * planned[0].sequence_length
        return size < _TOGETHER and not self.documents.media and self._stream.stays(state)

    def _build(self, planned: Sequence[Step]) -> Iterator[tuple[Frame, LoaderState]]:
        """Frames of steps of one length, as `collate.to_step_batch` reads them."""
        parts = [[row for part in self._stream.my_rows(step) for row in part] for step in planned]
        rows, length = list(itertools.chain.from_iterable(parts)), planned[0].sequence_length
        if length == SAMPLES:
            built = [stack_samples(part, self.documents, self._seed) for part in parts]
        else:
            arrays = pack_rows(rows, self.documents, self._tokenizer.eos_id, length, self._seed)
            size = len(parts[0])
            built = [cut_rows(arrays, at, at + size) for at in range(0, len(rows), size)]
        meta = {"micro_batch": self._stream.deal.micro_batch, "eos_id": self._tokenizer.eos_id}
        for step, found, bad in zip(planned, built, _deal(self.documents.news(), parts), strict=True):
            found["spans"] = np.concatenate(step.rows)[:, :3]
            yield Frame(meta | {"quarantined": bad}, found), step.after


def _deal(news: Sequence[dict[str, Any]], parts: Sequence[list[np.ndarray]]) -> list[list[dict[str, Any]]]:
    """Quarantine entries for each of some steps: those of its samples, and for the first those of none."""
    dealt: list[list[dict[str, Any]]] = [[] for _ in parts]
    samples = [set(np.concatenate(part)[:, 0].tolist()) for part in parts] if news else []
    for entry in news:
        dealt[next((n for n, held in enumerate(samples) if entry["sample"] in held), 0)].append(entry)
    return dealt


def check_batch(batch_rows: int, micro_batch: int, world: int) -> None:
    """Refuse a global batch that the ranks do not divide.

    Raises:
        UserError: names the numbers of ranks that would work.
    """
    if batch_rows >= 1 and micro_batch >= 1 and batch_rows % (micro_batch * world) == 0:
        return
    share = batch_rows // micro_batch if micro_batch >= 1 and batch_rows % micro_batch == 0 else 0
    works = [str(n) for n in range(1, share + 1) if share % n == 0]
    mend = (
        f"with these, {', '.join(works[:12])} rank{'s' * (works != ['1'])} would work"
        if works
        else "make the batch a positive multiple of the micro-batch"
    )
    raise UserError(
        f"a batch of {batch_rows} rows cannot be dealt to {world} ranks in micro-batches of {micro_batch} rows; {mend}"
    )
