"""Write a raw payload in one format: `python -m peers.write FORMAT FOLDER`, in an environment that has its library.

Every format gets the fields id, label and payload, in about `SHARDS` shards, as its library's documentation does it:
without compression where that is the default.
"""

from __future__ import annotations

import io
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from peers.payloads import SHARDS, Raw, labels

SUFFIXES = {"text": "txt", "tokens": "npy", "images": "jpg", "audio": "flac"}
# Which environment writes which format; None is the benchmark's own.
WRITERS = {"parquet": None, "tar": None, "mds": "mosaicml", "litdata": "litdata"}


def shard_size(samples: int) -> int:
    """Samples in a shard."""
    return -(-samples // SHARDS)


def write_parquet(modality: str, raw: Raw, folder: Path) -> None:
    """One file per shard, row groups of 1,000; a column named like the modality, tokens as lists of uint16."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    label, size = labels(len(raw)), shard_size(len(raw))
    for number, start in enumerate(range(0, len(raw), size)):
        ids = np.arange(start, min(start + size, len(raw)))
        payloads = [raw[i] for i in ids]
        column = {
            "text": lambda p=payloads: pa.array([x.decode() for x in p], pa.string()),
            "tokens": lambda p=payloads: pa.array([np.frombuffer(x, np.uint16) for x in p], pa.list_(pa.uint16())),
        }.get(modality, lambda p=payloads: pa.array(p, pa.binary()))()
        table = pa.table({"id": ids, "label": label[ids], modality: column})
        pq.write_table(table, folder / f"{number:05d}.parquet", row_group_size=1000)


def write_tar(modality: str, raw: Raw, folder: Path) -> None:
    """WebDataset: members KEY.cls and KEY.SUFFIX with the id as key; tokens as NumPy files."""
    label, size = labels(len(raw)), shard_size(len(raw))
    for number, start in enumerate(range(0, len(raw), size)):
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as file:
            for sample in range(start, min(start + size, len(raw))):
                parts = {
                    "cls": str(label[sample]).encode(),
                    SUFFIXES[modality]: _npy(raw[sample]) if modality == "tokens" else raw[sample],
                }
                for suffix, data in parts.items():
                    member = tarfile.TarInfo(f"{sample:08d}.{suffix}")
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))


def _npy(tokens: bytes) -> bytes:
    file = io.BytesIO()
    np.save(file, np.frombuffer(tokens, np.uint16))
    return file.getvalue()


def write_mds(modality: str, raw: Raw, folder: Path) -> None:
    """mosaicml-streaming's writer; it ends shards by size."""
    from streaming import MDSWriter

    columns = {
        "id": "int",
        "label": "int",
        "payload": {"text": "str", "tokens": "ndarray:uint16"}.get(modality, "bytes"),
    }
    limit = (int(raw.offsets[-1]) + 32 * len(raw)) // SHARDS + 4096
    label = labels(len(raw))
    with MDSWriter(out=str(folder), columns=columns, size_limit=limit, exist_ok=True) as writer:
        for sample in range(len(raw)):
            payload: Any = raw[sample].decode() if modality == "text" else raw[sample]
            if modality == "tokens":
                payload = np.frombuffer(payload, np.uint16)
            writer.write({"id": sample, "label": int(label[sample]), "payload": payload})


class _Item:
    """litdata's `optimize` pickles this function to its process."""

    def __init__(self, modality: str, source: Path) -> None:
        self.modality, self.source = modality, source
        self.raw: Raw | None = None

    def __call__(self, sample: int) -> dict[str, object]:
        self.raw = self.raw or Raw(self.source)
        payload = self.raw[sample].decode() if self.modality == "text" else self.raw[sample]
        return {"id": sample, "label": int(labels(len(self.raw))[sample]), "payload": payload}


def write_litdata(modality: str, raw: Raw, folder: Path) -> None:
    """litdata's `optimize` with one process, which keeps the order."""
    import litdata

    item = _Item(modality, folder.parent)
    size = shard_size(len(raw))
    litdata.optimize(item, list(range(len(raw))), str(folder), chunk_size=size, num_workers=1, reorder_files=False)


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    target, temporary = folder / kind, folder / f".{kind}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    {"parquet": write_parquet, "tar": write_tar, "mds": write_mds, "litdata": write_litdata}[kind](
        folder.name, Raw(folder), temporary
    )
    temporary.rename(target)


if __name__ == "__main__":
    main()
