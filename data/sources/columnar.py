"""Columns of a table in memory, row by row without copies: what Parquet and Arrow share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from millrace.core.errors import UserError, did_you_mean
from millrace.data import MODALITIES
from millrace.data.sources.base import MAX_SAMPLE_BYTES, BadSample, Content, Value, decode, text_bytes

Get = Callable[[int], Value | BadSample]


def wanted_columns(wanted: Sequence[str], names: Sequence[str], url: str) -> list[str]:
    """`wanted`, the columns to read, after a check that they are among `names`.

    Raises:
        UserError: one of them is missing.
    """
    for name in wanted:
        if name not in names:
            hint = did_you_mean(name, names) or f"; its columns are: {', '.join(names)}"
            raise UserError(f"{url} has no column '{name}'{hint}")
    return list(wanted)


def tokens_of(rows: Callable[[int], Rows], places: np.ndarray) -> list[np.ndarray] | None:
    """As `Source.tokens`: `rows` gives those of a block, the first number of a place; the second is the row in it."""
    found: list[np.ndarray] = []
    blocks = places[:, 0]
    borders = (blocks[1:] != blocks[:-1]).nonzero()[0] + 1
    for start, stop in itertools.pairwise([0, *borders.tolist(), len(places)]):
        tokens = rows(int(blocks[start])).tokens(places[start:stop, 1])
        if tokens is None:
            return None
        found += tokens
    return found


class Rows:
    """Rows of a table: `record(i)` gives a sample's values by role."""

    def __init__(self, table: pa.Table, columns: Mapping[str, str], url: str) -> None:
        """`columns` as in `Source`; raises `UserError` where a column has the wrong type."""
        self.length, self.nbytes = len(table), table.nbytes
        self._size = None
        if "tokens" in columns and columns.get("bytes") in table.column_names:
            self._size = table.column(columns["bytes"]).combine_chunks()
        self._tokens: tuple[np.ndarray, np.ndarray] | None = None  # offsets and values, where nothing else is asked for
        self._get: dict[str, Get] = {}
        for role, name in columns.items():
            if role != "bytes":
                array = table.column(name).combine_chunks()
                try:
                    self._get[role] = _reader(role, array)
                    if {*columns, "bytes"} == {"tokens", "bytes"} and isinstance(array, pa.Array):
                        self._tokens = _plain(array)
                except TypeError as error:
                    raise UserError(f"{url}: column '{name}' is {array.type}, {error}") from None

    def record(self, index: int, where: str) -> Content:
        """Values of row `index`; `where` names it in messages."""
        if not 0 <= index < self.length:
            return BadSample(f"{where} does not exist: there are {self.length}")
        found = {}
        for role, get in self._get.items():
            value = get(index)
            if isinstance(value, BadSample):
                return BadSample(f"{where}{value.why}")
            found[role] = value
        return found

    def records(self, rows: Sequence[int], where: Callable[[int], str]) -> list[Content]:
        """Values of `rows`; `where` names one of them in messages."""
        return [self.record(row, where(row)) for row in rows]

    def tokens(self, rows: np.ndarray) -> list[np.ndarray] | None:
        """As `Source.tokens`."""
        if self._tokens is None or not len(rows) or rows.min() < 0 or rows.max() >= self.length:
            return None
        at, values = self._tokens
        return [values[start:stop] for start, stop in zip(at[rows].tolist(), at[rows + 1].tolist(), strict=True)]

    def text_bytes(self, index: int, content: Content) -> int:
        """Bytes of the text of row `index`, or of the text that its tokens were made from."""
        return int(self._size[index].as_py() or 0) if self._size is not None else text_bytes(content)


def _reader(role: str, array: pa.Array) -> Get:
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of nothing
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if pa.types.is_dictionary(array.type):
        return _coded(role, array)
    if role == "tokens":
        return _tokens(array)
    if role in MODALITIES and pa.types.is_struct(array.type) and array.type.get_field_index("bytes") >= 0:
        array = array.flatten()[array.type.get_field_index("bytes")]  # how `datasets` stores files
    if role == "label" and pa.types.is_integer(array.type):
        array = array.cast(pa.string())
    return _text(array) if role in ("text", "label") else _binary(array)


def _coded(role: str, array: pa.Array) -> Get:
    """Rows of a dictionary array, looked up one by one: written out, a few long values could fill the memory."""
    read, known = _reader(role, array.dictionary), len(array.dictionary)
    codes = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
    null = array.is_null().to_numpy(zero_copy_only=False)

    def get(i: int) -> Value | BadSample:
        if null[i] or not 0 <= codes[i] < known:
            return BadSample(
                " is null" if null[i] else f" has code {codes[i]} of a dictionary of {known}: it is damaged"
            )
        return read(codes[i])

    return get


def _slices(array: pa.Array) -> tuple[Callable[[int], bool], np.ndarray, memoryview]:
    """(is a row null?, offsets of the rows, the bytes) of a binary or string array."""
    wide = pa.types.is_large_binary(array.type) or pa.types.is_large_string(array.type)
    _, offsets, data = array.buffers()
    count = array.offset + len(array) + 1
    at = np.frombuffer(offsets, np.int64 if wide else np.int32, count) if offsets else np.zeros(count, np.int64)
    null = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None
    return (
        (lambda i: bool(null[i])) if null is not None else (lambda i: False),
        at[array.offset :],
        memoryview(data) if data is not None else memoryview(b""),
    )


def _text(array: pa.Array) -> Get:
    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        raise TypeError("not text; name the text column with `text`")
    null, at, data = _slices(array)

    def get(i: int) -> str | BadSample:
        start, stop = int(at[i]), int(at[i + 1])
        if null(i) or stop - start > MAX_SAMPLE_BYTES:
            return _unfit(null(i), stop - start)
        text = decode(data[start:stop])
        return BadSample(f": {text.why}") if isinstance(text, BadSample) else text

    return get


def _binary(array: pa.Array) -> Get:
    if not (pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type)):
        raise TypeError("not bytes of files")
    null, at, data = _slices(array)

    def get(i: int) -> bytes | BadSample:
        start, stop = int(at[i]), int(at[i + 1])
        if null(i) or stop - start > MAX_SAMPLE_BYTES:
            return _unfit(null(i), stop - start)
        return bytes(data[start:stop])

    return get


def _unfit(null: bool, size: int) -> BadSample:
    return BadSample(" is null" if null else f" has {size} bytes, more than {MAX_SAMPLE_BYTES}")


def _plain(array: pa.Array) -> tuple[np.ndarray, np.ndarray] | None:
    """Offsets and values of lists of integers; None where a row or a value is null."""
    if pa.types.is_dictionary(array.type) or array.null_count or array.values.null_count:
        return None
    return np.from_dlpack(array.offsets), np.from_dlpack(array.values)  # `to_numpy` imports pandas


def _tokens(array: pa.Array) -> Get:
    kind = array.type
    if not ((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_integer(kind.value_type)):
        raise TypeError("not a list of integers")
    # By DLPack, and filled only where need be: `to_numpy` and `fill_null` import pandas where that is installed.
    filled = array.values.fill_null(0) if array.values.null_count else array.values
    at, values = np.from_dlpack(array.offsets), np.from_dlpack(filled)
    null = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None
    holes = array.values.is_null().to_numpy(zero_copy_only=False) if array.values.null_count else None

    def get(i: int) -> np.ndarray | BadSample:
        if null is not None and null[i]:
            return BadSample(" is null")
        if holes is not None and holes[at[i] : at[i + 1]].any():
            return BadSample(": a token is null")
        return values[at[i] : at[i + 1]]

    return get
