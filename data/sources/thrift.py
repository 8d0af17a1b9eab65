"""Structs of Thrift's compact protocol, in which Parquet writes its footer and the headers of its pages.

https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from typing import Any

_DEPTH = 16
DAMAGED = (
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    OverflowError,
)  # what a lie leads to, here and at callers

Struct = dict[int, Any]
"""Values by the number of their field: integers, bytes, lists, structs."""


def read_struct(raw: bytes, at: int, depth: int = 0) -> tuple[Struct, int]:
    """The struct at byte `at`, and where it ends; `IndexError` where the bytes end before, else one of `DAMAGED`."""
    found: Struct = {}
    number = 0
    if depth > _DEPTH:
        raise ValueError("nested too deep")
    while head := raw[at]:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(raw, at)
        kind = head & 15
        found[number], at = (kind == 1, at) if kind in (1, 2) else _value(raw, at, kind, depth)
    return found, at + 1


def _value(raw: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (4, 5, 6):
        return _integer(raw, at)
    if kind == 8:
        length, at = _varint(raw, at)
        if at + length > len(raw):
            raise IndexError
        return raw[at : at + length], at + length
    if kind in (9, 10):
        return _list(raw, at, depth)
    if kind == 12:
        return read_struct(raw, at, depth + 1)
    if kind in (1, 2, 3, 7):  # booleans in a list, bytes, doubles
        return None, at + (8 if kind == 7 else 1)
    raise ValueError(f"type {kind}, which Parquet has not")


def _list(raw: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    count, kind = raw[at] >> 4, raw[at] & 15
    at += 1
    if count == 15:
        count, at = _varint(raw, at)
    if count > len(raw):
        raise IndexError
    values = []
    for _ in range(count):
        value, at = _value(raw, at, kind, depth + 1)
        values.append(value)
    return values, at


def _integer(raw: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(raw, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = raw[at]
    at += 1
    if value < 128:
        return value, at
    value &= 127
    for shift in range(7, 70, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("an integer of more than 64 bits")
