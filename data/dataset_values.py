"""Values of rows of `datasets`, as samples hold them: media as the bytes of their files, never decoded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from millrace.data.sources.base import MAX_SAMPLE_BYTES, BadSample, Value, check_text


class Inside:
    """The places where files of a data set may lie; a row may name any other, such as a key of whoever reads it."""

    def __init__(self, *folders: Path, url: str = "") -> None:
        """`url` begins the URLs of its files, such as hf://datasets/OWNER/NAME@."""
        self._folders, self._url = [Path(os.path.abspath(folder)) for folder in folders], url

    def holds(self, path: str) -> bool:
        """Whether a path or URL is one of the data set's; "zip://MEMBER::" may stand before it. Follows no links."""
        *archives, where = path.split("::")
        if not all(archive.startswith("zip://") for archive in archives):
            return False
        if "://" in where:
            return bool(self._url) and where.startswith(self._url) and ".." not in where.split("/")
        real = Path(os.path.normpath(self._folders[0] / where))
        return any(real.is_relative_to(folder) for folder in self._folders)

    def read(self, path: str) -> bytes | BadSample:
        """What the file holds that a row names; a relative path is relative to the first folder."""
        import fsspec

        *archives, where = path.split("::")
        local = self._folders[0] / where if "://" not in where else None
        if not self.holds(path) or (local and not self.holds(str(local.resolve()))):
            return BadSample(f"the file '{path}' lies outside of the data set")
        try:
            with fsspec.open("::".join([*archives, str(local or where)]), "rb") as file:
                raw = bytes(file.read(MAX_SAMPLE_BYTES + 1))
        except (OSError, KeyError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
            return BadSample(f"the file '{path}' cannot be read: {why}")
        return BadSample(f"the file '{path}' has more than {MAX_SAMPLE_BYTES} bytes") if _too_long(raw) else raw


def value_of(role: str, value: Any, inside: Inside) -> Value | BadSample:
    """A value of `role` from a row of `datasets`: text, a list of integers, bytes, {"bytes", "path"}, or a path."""
    if value is None:
        return BadSample(f"the {role} is null")
    if role == "text":
        return check_text(value)
    if role == "tokens":
        return _tokens(value)
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str):
        return inside.read(value)
    if not isinstance(value, bytes):
        return BadSample(f"the {role} is {type(value).__name__}, neither bytes nor the path of a file")
    return BadSample(f"the {role} has {len(value)} bytes, more than {MAX_SAMPLE_BYTES}") if _too_long(value) else value


def _too_long(raw: bytes) -> bool:
    return len(raw) > MAX_SAMPLE_BYTES


def _tokens(value: Any) -> np.ndarray | BadSample:
    try:
        ids = np.asarray(value) if len(value) else np.empty(0, np.int64)
    except (TypeError, ValueError):  # no list, or lists of several lengths
        ids = np.empty(0)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        return BadSample("the tokens are not a list of integers")
    return ids
