"""The loader: an endless stream of global steps, of which each rank builds its own rows.

The plan is a function of (manifests, seed, stages) alone; rank and world decide only which rows are built, and
workers only who builds them. State counts what the trainer consumed, never what was prefetched.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from types import TracebackType

from millrace.core.errors import UserError
from millrace.data.batch import MicroBatch, SampleBatch, StepBatch, spans_sha
from millrace.data.builder import Builder, Opened, Spec, check_batch
from millrace.data.collate import pack_rows, stack_samples, to_micro_batch, to_sample_batch, to_step_batch
from millrace.data.config import DataConfig
from millrace.data.corpus import Corpus
from millrace.data.documents import Documents, Looks, bad_budget
from millrace.data.frames import Frame
from millrace.data.heap import keep_freed_memory
from millrace.data.manifest import manifest_folder
from millrace.data.mixture import ALL, Mixture, components
from millrace.data.prefetch import Prefetcher
from millrace.data.state import SAMPLES, LoaderState, Stage
from millrace.data.stores.waiting import stalls
from millrace.data.stream import Deal, Planner, RowStream, window_samples
from millrace.data.tokenizer import open_tokenizer, stored_tokenizer
from millrace.data.workers import Workers

__all__ = [
    "Loader",
    "MicroBatch",
    "StepBatch",
    "build_loader",
    "check_batch",
    "heldout_batches",
    "heldout_manifests",
    "spans_sha",
    "stored_tokenizer",
]

_HELDOUT_SEED = 0  # not the run's: runs of several seeds are judged by the same rows


class Loader:
    """Iterator of `StepBatch`; made by `build_loader`, ended by `close` (or as a context manager)."""

    def __init__(self, opened: Opened) -> None:
        config = opened.spec.config
        self.corpus, self.tokenizer = opened.corpus, opened.tokenizer
        self.state = opened.state  # after the last step that was handed out
        self._closed = False
        self._maker: _Inline | Workers
        if config.workers:
            self._maker = Workers(opened.spec, opened.state, config.workers)
        else:
            self._maker = _Inline(opened.builder(), opened.state)
        # Tensors are made (and pinned) in the prefetching thread: the trainer's has other things to do.
        self._next = partial(_batch, self._maker)
        self._prefetcher = Prefetcher(self._next, config.prefetch, self._maker.stalls) if config.prefetch else None
        # A thread that is in the middle of a read when the interpreter ends would abort the process.
        self._end = weakref.finalize(self, _end, self._maker, self._prefetcher)

    def exclude(self, bad: Mapping[int, str]) -> None:
        """Keep the samples of `bad` (sample → why) out of all steps prepared from now on; their places stay empty.

        With the quarantine entries of earlier starts, before the first step: recomputed steps are then the same, even
        if a sample that could not be read can be read now.

        Raises:
            UserError: more bad samples than `data.max_bad_samples` allows.
        """
        self._maker.exclude(bad)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepBatch:
        if self._closed:
            raise StopIteration
        try:
            batch = self._prefetcher.next() if self._prefetcher else self._next()
        except BaseException:
            self.close()
            raise
        self.state = batch.state
        return batch

    def close(self) -> None:
        """End threads and workers, and wait for them; a loader that is not closed does so when it is dropped."""
        self._closed = True
        self._end()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _batch(maker: _Inline | Workers) -> StepBatch:
    return to_step_batch(*maker.next())


def _end(maker: _Inline | Workers, prefetcher: Prefetcher[StepBatch] | None) -> None:
    if isinstance(maker, Workers):
        maker.close()
    if prefetcher is not None:
        prefetcher.close()
    if isinstance(maker, _Inline):
        maker.close()


class _Inline:
    """Builds the steps in this process."""

    def __init__(self, builder: Builder, state: LoaderState) -> None:
        keep_freed_memory()
        self._builder, self._steps = builder, builder.steps(state)

    def next(self) -> tuple[Frame, LoaderState]:
        return next(self._steps)

    def stalls(self) -> list[str]:
        return stalls()

    def exclude(self, bad: Mapping[int, str]) -> None:
        self._builder.documents.exclude(bad)

    def close(self) -> None:
        self._builder.documents.close()


def build_loader(
    config: DataConfig,
    *,
    seed: int,
    batch_rows: int,
    micro_batch: int,
    rank: int,
    world: int,
    state: LoaderState | None = None,
) -> Loader:
    """The training stream from its start, or from `state`, which any world size may have written.

    Raises:
        UserError: manifest, tokenizer or batch that do not fit, or a state of another stream.
    """
    check_batch(batch_rows, micro_batch, world)
    deal = Deal(batch_rows, micro_batch, rank, world)
    opened = Opened(Spec(config=config, seed=seed, deal=deal), state)
    _check_fit(opened.corpus, config)
    return Loader(opened)


def _check_fit(corpus: Corpus, config: DataConfig) -> None:
    """Refuse samples with media (which are never cut) that no row can hold, before the run meets them one by one."""
    if config.rows == "samples" or not corpus.media or not corpus.counted:
        return
    budget, found = bad_budget(corpus, config.max_bad_samples), corpus.count_longer(config.sequence_length)
    if found > budget:
        raise UserError(
            f"{found:,} of {corpus.samples:,} samples of {corpus.folder} cost more positions than a row has "
            f"({config.sequence_length}), more than data.max_bad_samples = {budget} allows; raise "
            "data.sequence_length, or prepare them with a smaller --image-most"
        )


def heldout_manifests(config: DataConfig) -> list[str]:
    """Folders of held-out manifests: the configured one, or heldout/ in every training manifest's folder."""
    if config.heldout:
        return [config.heldout]
    folders = [config.manifest] if isinstance(config.manifest, str) else config.manifest
    beside = [manifest_folder(folder) / "heldout" for folder in folders]
    return [str(folder) for folder in beside if (folder / "manifest.json").is_file()]


def heldout_batches(
    config: DataConfig, micro_batch: int, rank: int, world: int, max_rows: int | None = None
) -> Iterator[tuple[MicroBatch | SampleBatch, int]]:
    """One pass over the held-out manifest: (micro-batch, bytes of text that it covers; of whole samples 0).

    The order is shuffled and always the same, so that a part of the pass is a fair sample of the text.

    Every rank gets the same number of micro-batches (the last are filled up with rows without targets). The
    bytes of a document that is cut into spans are shared out in proportion and sum to the document exactly;
    `max_rows` bounds the rows of all ranks together. A bad document counts no bytes.

    Raises:
        UserError: no held-out manifest, or one that does not fit the tokenizer.
    """
    paths = heldout_manifests(config)
    if not paths:
        raise UserError(f"{config.manifest} has no held-out part; set data.heldout, or prepare with heldout=0.05")
    corpus = Corpus.load(paths)
    tokenizer = open_tokenizer(corpus, config.tokenizer or _tokenizer_of(config))
    packed = config.rows != "samples"
    looks = Looks.of(config, _HELDOUT_SEED)
    documents = Documents(corpus, tokenizer, config.max_bad_samples, config.threads, looks)
    stage = Stage(
        start_window=0,
        manifests=corpus.fingerprints,
        components=(ALL,),
        counts=(1,),
        batch=micro_batch * world,
        sequence_length=config.sequence_length if packed else SAMPLES,
        window=window_samples(corpus, config.window),
        shuffle_blocks=config.shuffle_blocks,
        pack="alone" if config.rows == "alone" else config.pack,
    )
    mixture = Mixture(corpus, components(corpus, weighted=False), _HELDOUT_SEED)
    planner = Planner(documents, mixture, _HELDOUT_SEED, once=True)
    stream = RowStream(
        planner, documents, Deal(micro_batch * world, micro_batch, rank, world), lambda steps, tokens: stage
    )
    state, rows, ended = LoaderState(_HELDOUT_SEED, (stage,)), 0, False
    while not ended and (max_rows is None or rows < max_rows):
        step = stream.step(state)
        state, ended = step.after, step.ended
        rows += len(step.rows)
        if any(len(row) for row in step.rows):
            mine = stream.my_rows(step)[0]
            if not packed:
                arrays = stack_samples(mine, documents, _HELDOUT_SEED)
                yield to_sample_batch(arrays, 0, len(mine), tokenizer.eos_id), 0
                continue
            arrays = pack_rows(mine, documents, tokenizer.eos_id, config.sequence_length, _HELDOUT_SEED)
            yield to_micro_batch(arrays), int(arrays["bytes"].sum())


def _tokenizer_of(config: DataConfig) -> str | None:
    folders = [config.manifest] if isinstance(config.manifest, str) else config.manifest
    stored = [stored_tokenizer(manifest_folder(folder)) for folder in folders if folder]
    return next((str(path) for path in stored if path), None)
