"""What an arm is told, and what it gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

BUCKET = "bench"
# The object server checks no signature, but the clients want to sign.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}


class Missing(Exception):
    """This arm does not exist (yet) for this job."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One stream over one payload, by one library."""

    arm: str
    modality: str  # text, tokens, images or audio
    data: str  # the folder that holds the folder of every modality; the object server's bucket
    endpoint: str | None  # http://HOST:PORT of the object server; None reads the folder
    cache: str  # a folder of this job alone
    tokenizer: str  # a tokenizer.json
    samples: int  # in an epoch
    batch: int
    workers: int
    seed: int

    def local(self, kind: str) -> Path:
        """The folder that holds the payload in a format: raw, parquet, tar, mds or litdata."""
        return Path(self.data) / self.modality / kind

    def files(self, kind: str, suffix: str, scheme: str = "s3") -> list[str]:
        """Paths of a format's files, or their URLs (`s3` or `http`) on the object server."""
        paths = sorted(self.local(kind).glob(f"*{suffix}"))
        if self.endpoint is None:
            return [str(path) for path in paths]
        root = f"s3://{BUCKET}" if scheme == "s3" else f"{self.endpoint}/{BUCKET}"
        return [f"{root}/{self.modality}/{kind}/{path.name}" for path in paths]


class Stream(Protocol):
    """One shuffled epoch, or what is left of it."""

    def __iter__(self) -> Iterator[Any]:
        """Batches as `peers.decode.Collate` makes them: {"ids": …, "labels": …, "data": …}."""

    def state(self) -> Any:
        """The library's own state after the last batch that was handed out; None where it has none."""
