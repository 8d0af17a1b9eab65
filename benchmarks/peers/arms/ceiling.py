"""No library: payloads in memory, torch's DataLoader over a random permutation; decode and batch are all the work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from peers.decode import Collate
from peers.job import Job
from peers.payloads import Raw, labels


class _Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, job: Job) -> None:
        self._raw = Raw(job.local("raw").parent)
        self._labels = labels(len(self._raw))

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, sample: int) -> tuple[int, int, bytes]:
        return sample, int(self._labels[sample]), self._raw[sample]


class CeilingStream:
    """Has no state: it is a ceiling for speed and shuffling only."""

    def __init__(self, job: Job) -> None:
        self._loader = torch.utils.data.DataLoader(
            _Samples(job), batch_size=job.batch, shuffle=True, num_workers=job.workers,
            collate_fn=Collate(job.modality, job.tokenizer), generator=torch.Generator().manual_seed(job.seed),
        )  # fmt: skip

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def state(self) -> None:
        """None."""


def open_stream(job: Job, state: Any) -> CeilingStream:
    """An epoch from memory, wherever the job's store is."""
    return CeilingStream(job)
