"""litdata on its own chunks: StreamingDataset with shuffle=True, StreamingDataLoader."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from litdata import StreamingDataLoader, StreamingDataset
from litdata.streaming import downloader

from peers.decode import Collate
from peers.job import BUCKET, CREDENTIALS, Job


class _Fields:
    def __init__(self, job: Job) -> None:
        self._collate = Collate(job.modality, job.tokenizer)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self._collate([(s["id"], s["label"], s["payload"]) for s in samples])


class LitdataStream:
    """State is the loader's `state_dict`."""

    def __init__(self, job: Job, state: Any) -> None:
        options: dict[str, Any] = {"shuffle": True, "seed": job.seed}
        if job.endpoint is None:
            where = str(job.local("litdata"))
        else:
            # litdata reads chunks with obstore, gives it options of its own, and none of them lets it speak plain http.
            os.environ |= CREDENTIALS
            downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
            where = f"s3://{BUCKET}/{job.modality}/litdata"
            names = {"AWS_ACCESS_KEY_ID": "aws_access_key_id", "AWS_SECRET_ACCESS_KEY": "aws_secret_access_key"}
            options["storage_options"] = {"endpoint_url": job.endpoint, "region_name": "us-east-1"} | {
                theirs: CREDENTIALS[ours] for ours, theirs in names.items()
            }
            options["cache_dir"] = job.cache
        dataset = StreamingDataset(where, **options)
        self._loader = StreamingDataLoader(
            dataset, batch_size=job.batch, num_workers=job.workers, collate_fn=_Fields(job)
        )
        if state is not None:
            self._loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def state(self) -> Any:
        """{dataset: …, current_epoch, num_samples_yielded, latest_worker_idx}."""
        return self._loader.state_dict()


def open_stream(job: Job, state: Any) -> LitdataStream:
    """An epoch, or the rest of it."""
    return LitdataStream(job, state)
