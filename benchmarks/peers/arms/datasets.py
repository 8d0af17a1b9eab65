"""`datasets` streaming Parquet with a shuffle buffer of 1,000 (its default), torchdata's StatefulDataLoader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import load_dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from peers.decode import Collate
from peers.job import CREDENTIALS, Job


class _Fields:
    def __init__(self, job: Job) -> None:
        self._collate, self._column = Collate(job.modality, job.tokenizer), job.modality

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self._collate([(int(s["id"]), int(s["label"]), s[self._column]) for s in samples])


class DatasetsStream:
    """State is the loader's `state_dict`, which holds that of the data set."""

    def __init__(self, job: Job, state: Any) -> None:
        options: dict[str, Any] = {}
        if job.endpoint is not None:
            options["storage_options"] = {
                "key": CREDENTIALS["AWS_ACCESS_KEY_ID"], "secret": CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
                "client_kwargs": {"endpoint_url": job.endpoint, "region_name": "us-east-1"},
            }  # fmt: skip
        dataset = load_dataset(
            "parquet", data_files=job.files("parquet", ".parquet"), split="train", streaming=True,
            cache_dir=job.cache, **options,
        ).shuffle(seed=job.seed)  # fmt: skip
        if job.modality == "tokens":
            dataset = dataset.with_format("numpy")  # else every token becomes a Python integer
        self._loader = StatefulDataLoader(
            dataset, batch_size=job.batch, num_workers=job.workers, collate_fn=_Fields(job)
        )
        if state is not None:
            self._loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def state(self) -> Any:
        """Of every worker: shard, example in it; not the shuffle buffer."""
        return self._loader.state_dict()


def open_stream(job: Job, state: Any) -> DatasetsStream:
    """An epoch, or the rest of it."""
    return DatasetsStream(job, state)
