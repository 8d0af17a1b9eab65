"""Frames: arrays and plain values as bytes, for pipes between a rank and its workers. Nothing is pickled."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

_HEAD = struct.Struct("<Q")  # length of the JSON header


@dataclass
class Frame:
    """Plain values (JSON) and arrays by name."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def write_frame(file: BinaryIO, frame: Frame) -> None:
    """Write a frame and flush.

    Raises:
        BrokenPipeError: nobody reads any more.
    """
    listed = [[name, array.dtype.str, array.shape] for name, array in frame.arrays.items()]
    header = json.dumps([frame.meta, listed]).encode()
    file.write(_HEAD.pack(len(header)) + header)
    for array in frame.arrays.values():
        if array.nbytes:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    file.flush()


def read_frame(file: BinaryIO) -> Frame | None:
    """The next frame; None where the other side ended, in the middle of a frame too. The arrays are writable."""
    head = _read(file, _HEAD.size)
    header = head and _read(file, _HEAD.unpack(head)[0])
    if not header:
        return None
    meta, listed = json.loads(bytes(header))
    frame = Frame(meta)
    for name, dtype, shape in listed:
        array = np.empty(shape, dtype)
        if array.nbytes and not _fill(file, array.reshape(-1).view(np.uint8).data):
            return None
        frame.arrays[name] = array
    return frame


def _read(file: BinaryIO, length: int) -> bytearray | None:
    raw = bytearray(length)
    return raw if _fill(file, memoryview(raw)) else None


def _fill(file: BinaryIO, view: memoryview) -> bool:
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            return False
        view = view[count:]
    return True
