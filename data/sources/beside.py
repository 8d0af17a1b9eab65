"""Files that lie beside a shard: an index, images that a table names."""

from __future__ import annotations

import posixpath
from pathlib import Path
from urllib.parse import quote

from millrace.data.stores.base import Blob, open_blob, scheme_of


def url_beside(url: str, name: str) -> str:
    """URL of `name` (a relative path) in the folder of `url`; a query, such as an access token, is kept."""
    if scheme_of(url) not in ("http", "https"):
        return posixpath.join(posixpath.dirname(url), name)
    where, mark, query = url.partition("?")
    return posixpath.join(posixpath.dirname(where), quote(name)) + mark + query


def replace_suffix(url: str, suffix: str) -> str:
    """URL of the file that has another suffix: `corpus.bin` and `.idx` give `corpus.idx`."""
    name = posixpath.basename(url.partition("?")[0] if scheme_of(url).startswith("http") else url)
    return url_beside(url, posixpath.splitext(name)[0] + suffix)


def open_named(blob: Blob, name: str) -> Blob:
    """Open the file `name`, as a table in the shard `blob` gives it: in the shard's folder or below.

    Raises:
        ValueError: a name that could lead elsewhere, or (on a local disk) does so by a link or is no file; says why.
        StoreError: it cannot be read.
    """
    if not name or not name.isprintable():
        raise ValueError(f"the file name {name!r} is empty or has characters that cannot be printed")
    if "://" in name or name.startswith(("/", "\\", "~")) or name[1:2] == ":":
        raise ValueError(f"the file name '{name}' is not relative to the folder")
    if ".." in name.replace("\\", "/").split("/"):
        raise ValueError(f"the file name '{name}' leads out of the folder by '..'")
    url = url_beside(blob.url, name)
    if scheme_of(url) == "file":
        _check_local(Path(url.removeprefix("file://")), Path(blob.url.removeprefix("file://")).parent, name)
    return open_blob(url)


def _check_local(path: Path, folder: Path, name: str) -> None:
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        why = getattr(error, "strerror", None) or "links in a circle"
        raise ValueError(f"the file '{name}' cannot be found: {why}") from None
    if not real.is_relative_to(folder.resolve()):
        raise ValueError(f"the file '{name}' is a link that leads out of the folder")
    if not real.is_file():
        raise ValueError(f"'{name}' is not a regular file")
