"""webdataset on tar: WebDataset with shardshuffle and a shuffle buffer of 1,000, WebLoader.

It keeps no state. Its author recommends to start a stopped job anew, preferably with `resampled=True`
(webdataset/webdataset, issues 177, 234 and 271); so does this arm, with another seed. Without `resampled`, an epoch
holds every sample once, as in the other arms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import webdataset as wds

from peers.decode import Collate
from peers.job import Job
from peers.write import SUFFIXES

_NPY_HEADER = 128  # bytes of it in a short array of one dimension; NumPy's own reader costs many times as much
_BUFFER = 1000  # "usually, pick something bigger, like 1000", its README says of a buffer of 10


class _Fields:
    def __init__(self, job: Job) -> None:
        self._collate, self._suffix = Collate(job.modality, job.tokenizer), SUFFIXES[job.modality]

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self._collate([(int(s["__key__"]), int(s["cls"]), self._payload(s)) for s in samples])

    def _payload(self, sample: dict[str, Any]) -> Any:
        raw = sample[self._suffix]
        return np.frombuffer(raw, np.uint16, offset=_NPY_HEADER) if self._suffix == "npy" else raw


class WebStream:
    """Has no state."""

    def __init__(self, job: Job) -> None:
        urls = job.files("tar", ".tar", scheme="http")
        dataset = wds.WebDataset(urls, shardshuffle=100, seed=job.seed).shuffle(_BUFFER, seed=job.seed)
        batches = dataset.batched(job.batch, collation_fn=_Fields(job), partial=True)
        self._loader = wds.WebLoader(batches, batch_size=None, num_workers=job.workers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def state(self) -> None:
        """None."""


def open_stream(job: Job, state: Any) -> WebStream:
    """An epoch from its start."""
    return WebStream(job)
