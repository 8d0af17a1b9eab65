"""millrace on Parquet, tar and MDS.

Text and tokens are packed into rows of 1,024, all of every document; images and sounds come as whole samples.
A packed sample counts as delivered in the batch that holds its last span. The windows divide the epoch, so that none
holds samples of two epochs. Without workers nothing is prefetched: as in the other arms, the caller's thread does it
all.
"""

from __future__ import annotations

import json
import os
import sys
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
from peers.job import CREDENTIALS, Job
from peers.payloads import labels
from peers.write import SUFFIXES

_WINDOW = 1000  # samples
_ROLES = {"text": "text", "tokens": "tokens", "images": "image", "audio": "audio"}


def _column(kind: str, modality: str) -> str:
    return {"parquet": modality, "tar": SUFFIXES[modality], "mds": "payload"}[kind]


def _manifest(job: Job) -> Path:
    return job.local(f"manifest-{job.arm.removeprefix('ours-')}-{'server' if job.endpoint else 'local'}")


def _use_server(job: Job) -> None:
    if job.endpoint:
        os.environ |= CREDENTIALS | {"AWS_ENDPOINT_URL": job.endpoint, "AWS_ALLOW_HTTP": "true"}
    os.environ["MILLRACE_CACHE"] = str(Path(job.cache) / "millrace")


def make_manifest(job: Job) -> None:
    """Index the payload of a job where it lies, unless it was."""
    if (_manifest(job) / "manifest.json").exists():
        return
    _use_server(job)
    kind = job.arm.removeprefix("ours-")
    columns: dict[str, Any] = {_ROLES[job.modality]: _column(kind, job.modality)}
    inputs, tokenizer = job.files(kind, f".{kind}"), str(Path(job.tokenizer).parent)
    prepare(PrepareConfig(inputs=inputs, out=str(_manifest(job)), tokenizer=tokenizer, **columns))


class OurStream:
    """The loader is endless: it stops after an epoch's samples."""

    def __init__(self, job: Job, state: Any) -> None:
        manifest = Manifest.load(_manifest(job))
        self._packed = job.modality in ("text", "tokens")
        batch = job.batch
        if self._packed:  # as many rows as the documents of a batch fill
            batch = max(1, round(job.batch * manifest.tokens / manifest.samples / ROW))
            self._costs = manifest.entries(np.arange(manifest.samples)).tokens
        self._labels = labels(manifest.samples)
        self._left = job.samples - (state["samples"] if state else 0)
        config = DataConfig(
            manifest=str(_manifest(job)), sequence_length=ROW, window=_WINDOW, workers=job.workers, threads=1,
            rows="packed" if self._packed else "samples", **({} if job.workers else {"prefetch": 0}),
        )  # fmt: skip
        self._loader = build_loader(
            config, seed=job.seed, batch_rows=batch, micro_batch=batch, rank=0, world=1,
            state=LoaderState.from_dict(state["loader"]) if state else None,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Any]:
        with self._loader:
            for step in self._loader:
                (micro,) = step.micro_batches
                ids = (self._ended(step) if self._packed else np.array(micro.samples))[: self._left]
                self._left -= len(ids)
                data = (
                    (micro.input_ids_BT, micro.labels_BT, micro.position_ids_BT)
                    if self._packed
                    else next(iter(micro.values.values()))
                )
                yield {"ids": ids, "labels": self._labels[ids], "data": data}
                if self._left == 0:
                    return

    def _ended(self, step: Any) -> np.ndarray:
        """Samples whose last span is in the step."""
        spans = step.step_spans
        return spans[spans[:, 2] == self._costs[spans[:, 0]], 0]

    def state(self) -> Any:
        """The loader's, and how many samples it delivered: an epoch's end is the trainer's to know."""
        return {"loader": self._loader.state.to_dict(), "samples": len(self._labels) - self._left}


def open_stream(job: Job, state: Any) -> OurStream:
    """An epoch, or the rest of it."""
    _use_server(job)
    return OurStream(job, state)


if __name__ == "__main__":
    make_manifest(Job(**json.loads(sys.argv[1])))
