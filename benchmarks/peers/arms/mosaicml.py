"""mosaicml-streaming on MDS: StreamingDataset with shuffle=True and its defaults, StreamingDataLoader."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from peers.decode import Collate
from peers.job import BUCKET, CREDENTIALS, Job


class _Fields:
    def __init__(self, job: Job) -> None:
        self._collate = Collate(job.modality, job.tokenizer)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self._collate([(s["id"], s["label"], s["payload"]) for s in samples])


class MosaicStream:
    """State is the loader's `state_dict`."""

    def __init__(self, job: Job, state: Any) -> None:
        if job.endpoint is None:
            where = {"local": str(job.local("mds"))}
        else:
            os.environ |= CREDENTIALS | {"S3_ENDPOINT_URL": job.endpoint}
            where = {"local": str(Path(job.cache) / "mds"), "remote": f"s3://{BUCKET}/{job.modality}/mds"}
        dataset = StreamingDataset(**where, shuffle=True, shuffle_seed=job.seed, batch_size=job.batch)
        for stream in dataset.streams:
            # 0.13.0 reads the index over a connection that the workers, forked, would go on to share: over plain http
            # they get each other's shards, without an error. A client of their own is what they need.
            stream._downloader.clean_up()
        self._loader = StreamingDataLoader(
            dataset, batch_size=job.batch, num_workers=job.workers, collate_fn=_Fields(job)
        )
        if state is not None:
            self._loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def state(self) -> Any:
        """{epoch, sample_in_epoch, …}."""
        return self._loader.state_dict()


def open_stream(job: Job, state: Any) -> MosaicStream:
    """An epoch, or the rest of it.

    Its documentation asks for `clean_stale_shared_memory` before a start where an earlier one may have been killed.
    """
    clean_stale_shared_memory()
    return MosaicStream(job, state)
