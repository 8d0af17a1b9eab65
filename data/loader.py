"""The loader: an endless stream of global steps, of which each rank builds its own rows.

The plan is a function of (manifest, seed, stage) alone; rank and world decide only which rows are built.
State counts what the trainer consumed, never what was prefetched.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from millrace.core.errors import UserError
from millrace.data.batch import IGNORED, MicroBatch, StepBatch, collate, spans_sha, to_spans
from millrace.data.config import DataConfig
from millrace.data.corpus import Corpus
from millrace.data.manifest import manifest_folder
from millrace.data.mixture import ALL, Mixture, components, counts
from millrace.data.reader import Documents
from millrace.data.state import LoaderState, Stage
from millrace.data.stream import Deal, Planner, RowStream, window_samples
from millrace.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Loader",
    "MicroBatch",
    "StepBatch",
    "build_loader",
    "heldout_batches",
    "heldout_manifests",
    "spans_sha",
    "stored_tokenizer",
]

_HELDOUT_SEED = 0  # not the run's: runs of several seeds are judged by the same rows


class Loader:
    """Iterator of `StepBatch`; made by `build_loader`, ended by `close` (or as a context manager)."""

    def __init__(self, stream: RowStream, documents: Documents, tokenizer: Tokenizer, state: LoaderState) -> None:
        self.corpus: Corpus = documents.reader.corpus
        self.tokenizer = tokenizer
        self.state = state  # after the last step that was handed out
        self._stream, self._documents = stream, documents
        self._next = state  # after the last step that was prepared
        self._queue: queue.Queue[StepBatch | BaseException] | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def prefetch(self, steps: int) -> Loader:
        """Prepare up to `steps` ahead in a background thread, from the first `next` on."""
        if steps:
            self._queue = queue.Queue(maxsize=steps)
            self._thread = threading.Thread(target=self._produce, name="millrace-loader", daemon=True)
        return self

    def exclude(self, bad: Mapping[int, str]) -> None:
        """Keep the samples of `bad` (sample → why) out of all steps prepared from now on; their places stay empty.

        With the quarantine entries of earlier starts, before the first step: recomputed steps are then the same, even
        if a sample that could not be read can be read now.

        Raises:
            UserError: more bad samples than `data.max_bad_samples` allows.
        """
        self._documents.exclude(bad)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepBatch:
        if self._closed.is_set():
            raise StopIteration
        if self._queue is None or self._thread is None:
            batch: StepBatch | BaseException = self._prepare()
        else:
            if self._thread.ident is None:
                self._thread.start()
            batch = self._take()
        if isinstance(batch, BaseException):
            self.close()
            raise batch
        self.state = batch.state
        return batch

    def close(self) -> None:
        """End the background thread and wait for it."""
        self._closed.set()
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> StepBatch | BaseException:
        """The next prepared step; an end of iteration if another thread closes the loader meanwhile."""
        assert self._queue is not None
        while not self._closed.is_set():
            try:
                return self._queue.get(timeout=1.0)
            except queue.Empty:
                continue
        return StopIteration()

    def _produce(self) -> None:
        while not self._closed.is_set():
            try:
                item: StepBatch | BaseException = self._prepare()
            except BaseException as error:  # travels to the consumer
                item = error
            self._offer(item)
            if isinstance(item, BaseException):
                return

    def _offer(self, item: StepBatch | BaseException) -> None:
        assert self._queue is not None
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _prepare(self) -> StepBatch:
        step = self._stream.step(self._next)
        rows = self._stream.my_rows(step)
        micro = [collate(part, self._documents, self.tokenizer, step.sequence_length) for part in rows]
        self._next = step.after
        return StepBatch(
            micro_batches=micro,
            local_tokens=sum(int((m.labels_BT != IGNORED).sum()) for m in micro),
            spans=to_spans(np.concatenate(step.rows)),
            state=self._next,
            quarantined=self._documents.news(),
        )


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
    corpus, tokenizer = _open(config.manifest, config.tokenizer)
    parts = components(corpus, weighted=bool(config.mixture))
    # Shards that were appended must not change the windows of a stream that is under way.
    grown = state is not None and state.stages[0].manifests != corpus.fingerprints
    window = state.stages[0].window if state is not None and grown else window_samples(corpus, config.window)

    def wanted(steps: int, tokens: int) -> Stage:
        return Stage(
            start_window=0,
            manifests=corpus.fingerprints,
            components=tuple(parts),
            counts=counts(config.mixture.at(steps, tokens), corpus.sources()) if config.mixture else (1,),
            batch=batch_rows,
            sequence_length=config.sequence_length,
            window=window,
            shuffle_blocks=config.shuffle_blocks,
            pack=config.pack,
        )

    first = wanted(0, 0)
    if state is not None:
        state.check(first, seed)
        for stage in state.stages:
            corpus.check(stage.manifests)
    for stage in (first, *(state.stages[-1:] if state else ())):
        check_batch(stage.batch, micro_batch, world)
    documents = Documents(corpus, tokenizer, config.max_bad_samples)
    planner = Planner(documents, Mixture(corpus, parts, seed), seed)
    stream = RowStream(planner, documents, Deal(batch_rows, micro_batch, rank, world), wanted)
    return Loader(stream, documents, tokenizer, state or LoaderState(seed, (first,))).prefetch(config.prefetch)


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


def stored_tokenizer(manifest_folder: Path) -> Path | None:
    """The tokenizer stored with a manifest: in its folder, or beside a held-out manifest's folder."""
    for folder in (manifest_folder, manifest_folder.parent):
        if (folder / "tokenizer" / "tokenizer.json").is_file():
            return folder / "tokenizer"
    return None


def _open(paths: str | Sequence[str], tokenizer: str | None) -> tuple[Corpus, Tokenizer]:
    corpus = Corpus.load(paths)
    name = tokenizer or stored_tokenizer(corpus.manifests[0].folder)
    if name is None:
        raise UserError(f"no tokenizer lies beside {corpus.folder}; set data.tokenizer to a folder or hub name")
    loaded = load_tokenizer(name)
    corpus.manifests[0].check_tokenizer(loaded.sha256, str(name))
    return corpus, loaded


def heldout_manifests(config: DataConfig) -> list[str]:
    """Folders of held-out manifests: the configured one, or heldout/ in every training manifest's folder."""
    if config.heldout:
        return [config.heldout]
    folders = [config.manifest] if isinstance(config.manifest, str) else config.manifest
    beside = [manifest_folder(folder) / "heldout" for folder in folders]
    return [str(folder) for folder in beside if (folder / "manifest.json").is_file()]


def heldout_batches(
    config: DataConfig, micro_batch: int, rank: int, world: int, max_rows: int | None = None
) -> Iterator[tuple[MicroBatch, int]]:
    """One pass over the held-out manifest: (micro-batch, bytes of text that it covers).

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
    corpus, tokenizer = _open(paths, config.tokenizer or _tokenizer_of(config))
    documents = Documents(corpus, tokenizer, config.max_bad_samples)
    stage = Stage(
        start_window=0,
        manifests=corpus.fingerprints,
        components=(ALL,),
        counts=(1,),
        batch=micro_batch * world,
        sequence_length=config.sequence_length,
        window=window_samples(corpus, config.window),
        shuffle_blocks=config.shuffle_blocks,
        pack=config.pack,
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
            batch = collate(mine, documents, tokenizer, config.sequence_length)
            yield batch, _covered_bytes(mine, {entry["sample"] for entry in documents.news()})


def _tokenizer_of(config: DataConfig) -> str | None:
    first = config.manifest if isinstance(config.manifest, str) else config.manifest[0]
    stored = stored_tokenizer(manifest_folder(first)) if first else None
    return str(stored) if stored else None


def _covered_bytes(rows: list[np.ndarray], bad: set[object]) -> int:
    spans = np.concatenate(rows)
    spans = spans[[sample not in bad for sample in spans[:, 0].tolist()]]
    _, start, end, cost, size = spans.T
    return int((size * end // cost - size * start // cost).sum())
