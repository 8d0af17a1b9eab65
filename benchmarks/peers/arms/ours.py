"""millrace on Parquet, tar and MDS. Text and tokens are packed into rows of 1,024, all of every document.

A sample counts as delivered in the batch that holds its last span. The windows divide the epoch, so that none holds
samples of two epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from millrace.data.config import DataConfig
from millrace.data.loader import build_loader
from millrace.data.manifest import Manifest
from millrace.data.prepare import PrepareConfig, prepare
from millrace.data.state import LoaderState
from peers.decode import ROW
from peers.job import Job, Missing
from peers.payloads import labels


def make_manifest(folder: Path, modality: str, tokenizer: str) -> None:
    """Index the Parquet files of a payload folder in place; tokens are tokenised anew from the text beside them."""
    source = folder.parent / "text" / "parquet"
    options: dict[str, Any] = {"tokenize": True} if modality == "tokens" else {}
    inputs = [str(source / "*.parquet")]
    prepare(PrepareConfig(inputs=inputs, out=str(folder / "manifest"), tokenizer=tokenizer, **options))


class OurStream:
    """The present loader, which is endless: it stops after an epoch's samples."""

    def __init__(self, job: Job, state: Any) -> None:
        folder = job.local("manifest")
        manifest = Manifest.load(folder)
        cost = max(1, manifest.tokens // manifest.samples)
        self._rows = max(1, round(job.batch * cost / ROW))
        self._costs = manifest.entries(np.arange(manifest.samples)).tokens
        self._labels = labels(manifest.samples)
        self._left = job.samples - (state["samples"] if state else 0)
        self._loader = build_loader(
            DataConfig(manifest=str(folder), sequence_length=ROW, window=1000),
            seed=job.seed, batch_rows=self._rows, micro_batch=self._rows, rank=0, world=1,
            state=LoaderState.from_dict(state["loader"]) if state else None,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Any]:
        with self._loader:
            for step in self._loader:
                spans = np.array(step.spans, np.int64).reshape(-1, 3)
                ended = spans[spans[:, 2] == self._costs[spans[:, 0]], 0][: self._left]
                self._left -= len(ended)
                yield {"ids": ended, "labels": self._labels[ended], "data": step.micro_batches[0].input_ids_BT}
                if self._left == 0:
                    return

    def state(self) -> Any:
        """The loader's, and how many samples it delivered: an epoch's end is the trainer's to know."""
        return {"loader": self._loader.state.to_dict(), "samples": len(self._labels) - self._left}


def open_stream(job: Job, state: Any) -> OurStream:
    """An epoch, or the rest of it.

    Raises:
        Missing: what the loader cannot do yet.
    """
    kind = job.arm.removeprefix("ours-")
    if kind != "parquet" or job.modality not in ("text", "tokens") or job.endpoint or job.workers:
        raise Missing(f"millrace reads no {job.modality} from {kind} with {job.workers} workers yet")
    return OurStream(job, state)
