"""Values of samples, made from the bytes of a file or a member: text is decoded, media stay encoded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from millrace.core.errors import UserError
from millrace.data.sources.base import BadSample, Value, decode

PICKLED = ("pyd", "pkl", "pickle", "pth", "pt")  # what other readers unpickle, that is: execute

_NPY = re.compile(rb"\x93NUMPY([\x01\x02\x03])\x00(..)", re.DOTALL)
_DESCR = re.compile(r"'descr': '([<>|])([ui])([1248])'")
_SHAPE = re.compile(r"'shape': \((\d+),\)")


def check_roles(columns: Mapping[str, str], roles: Iterable[str], what: str) -> None:
    """Refuse a role that a format cannot hold.

    Raises:
        UserError: it names the roles that `what` can hold.
    """
    known = list(roles)
    for role, name in columns.items():
        if role not in known:
            raise UserError(f"{what} cannot hold '{role}' ('{name}'); it holds {', '.join(known)}")


def to_value(role: str, raw: bytes | memoryview) -> Value | BadSample:
    """A value of `role` from a file's content: UTF-8 text, token ids as .npy, the bytes of an image or a sound."""
    if role == "text":
        return decode(raw)
    if role == "tokens":
        return from_npy(bytes(raw))
    return bytes(raw)


def from_npy(raw: bytes) -> np.ndarray | BadSample:
    """A one-dimensional array of integers from a NumPy file, as a view of it.

    Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html. The header, a Python literal, is
    matched rather than evaluated: objects, which would be unpickled, and all other types are refused.
    """
    match = _NPY.match(raw)
    if not match:
        return BadSample("not a NumPy file (.npy)")
    wide = match[1] != b"\x01"
    start = 12 if wide else 10
    start += int.from_bytes(raw[8:start], "little")
    header = raw[10:start].decode("latin-1")
    kind, shape = _DESCR.search(header), _SHAPE.search(header)
    if not kind or not shape:
        return BadSample(f"not a one-dimensional array of integers: {header.strip()[:100]}")
    dtype = np.dtype("".join(kind.groups()))
    if len(raw) - start != int(shape[1]) * dtype.itemsize:
        return BadSample(f"{len(raw) - start} bytes of values in a NumPy file of {shape[1]} times {dtype}")
    return np.frombuffer(raw, dtype, offset=start)


def without_borders(ids: np.ndarray, bos_id: int, eos_id: int) -> np.ndarray:
    """Token ids (n,) without one BOS at the start and one EOS at the end, where they are: the loader adds its own.

    Corpora that were tokenised elsewhere may have them (Megatron's --append-eod), or not, or only some documents.
    """
    start = 1 if len(ids) and ids[0] == bos_id else 0
    stop = len(ids) - 1 if len(ids) > start and ids[-1] == eos_id else len(ids)
    return ids[start:stop]
