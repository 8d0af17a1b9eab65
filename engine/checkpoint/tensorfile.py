"""Writing safetensors as a stream: one tensor in memory at a time, hashed on the way.

The format is that of https://github.com/huggingface/safetensors: eight bytes of header length, a JSON header, raw
little-endian data. Reading is left to the library.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 16 * 2**20


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Write the tensors named in `shapes`, asking `read(name)` for one at a time; fsync the file.

    Returns:
        (size in bytes, SHA-256 in hex) of the file.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        size = dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, total = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for block in _blocks(text, shapes, read):
            file.write(block)
            digest.update(block)
            total += len(block)
        file.flush()
        os.fsync(file.fileno())
    return total, digest.hexdigest()


def _blocks(text: bytes, shapes: Mapping, read: Callable[[str], torch.Tensor]) -> Iterable[bytes | memoryview]:
    yield struct.pack("<Q", len(text))
    yield text
    for name, (dtype, shape) in shapes.items():
        tensor = read(name)
        assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape), name
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        view = memoryview(flat)  # type: ignore[arg-type]
        for start in range(0, len(view), _CHUNK):
            yield view[start : start + _CHUNK]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()
