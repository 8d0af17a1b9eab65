"""What is indexed: files, folders, globs and URLs, resolved to a list of files with their kinds, sizes and versions."""

from __future__ import annotations

import glob
import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.core.errors import UserError, did_you_mean
from millrace.data.dataset_files import DATASET, dataset_files
from millrace.data.stores.base import Blob, StoreError, open_blob, scheme_of

# By suffix; a kind that SOURCES does not have is refused when it is read.
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "tar",
    ".mds": "mds",
    ".mds.gz": "mds",
    ".mds.zst": "mds",
    ".mds.zstd": "mds",
    ".bin": "megatron",  # with an .idx beside it
}
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
FOLDER = ("metadata.jsonl", "metadata.csv")  # these list the files of a folder of images or sounds
_NAMED = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)")
_GLOB = re.compile(r"[*?\[]")
_LOOKS = 16  # files whose size and version are asked for at once

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all or 0 where unknown)."""


@dataclass(frozen=True)
class InputFile:
    """A file to index; `source` numbers the input that named it, `version` is its blob's."""

    url: str
    kind: str
    source: int
    size: int
    version: str

    def key(self) -> list[Any]:
        """What must not change while a folder is being prepared."""
        return [self.url, self.kind, self.source, self.size, self.version]


def sha256_of(blob: Blob) -> str:
    """SHA-256 of a file's content, streamed.

    Raises:
        StoreError: it cannot be read.
    """
    with blob.open() as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def name_inputs(inputs: Sequence[str]) -> dict[str, str]:
    """Inputs by name, in order: written NAME=WHERE, or named by the last part of where they lie.

    A path that has an equals sign and exists, such as year=2024/, is a path.

    Raises:
        UserError: two inputs of one name.
    """
    named: dict[str, str] = {}
    for text in inputs:
        match = _NAMED.fullmatch(text)
        name, where = match.groups() if match and not _exists(text) else (_default_name(text), text)
        if name in named:
            raise UserError(
                f"two inputs are named '{name}' ('{named[name]}' and '{where}'); name one yourself, as in OTHER={where}"
            )
        named[name] = where
    return named


def _exists(path: str) -> bool:
    return Path(path).exists() or bool(glob.glob(path, recursive=True))


def _default_name(where: str) -> str:
    if where.startswith(DATASET):
        where = where.split(":")[1]
    if scheme_of(where) == "file":
        where = str(Path(where.removeprefix("file://")).expanduser().absolute())
    else:
        where = where.partition("?")[0] if where.startswith("http") else where
    *_, last = [part for part in where.split("/") if part and not _GLOB.search(part)] or ["data"]
    ends = [suffix for suffix in (*KINDS, *TEXT_SUFFIXES) if last.endswith(suffix) and last != suffix]
    return last.removesuffix(max(ends, key=len, default=""))


def resolve(inputs: Sequence[str], kind: str, out: Path) -> list[InputFile]:
    """Files of all inputs, each input's sorted by path; `out` is left out of folders that hold it.

    Raises:
        UserError: nothing there, nothing readable there, or a file that two inputs name.
    """
    found: dict[str, int] = {}
    for source, name in enumerate(inputs):
        for url in _named(name, kind, out, source):
            if url in found:
                raise UserError(f"{url} is named twice, by '{inputs[found[url]]}' and '{name}'; name it once")
            found[url] = source
    with ThreadPoolExecutor(_LOOKS) as pool:
        looks = list(pool.map(look, found))
    return [
        InputFile(url, _kind_of(inputs[source], url, kind), source, size, version)
        for (url, source), (size, version) in zip(found.items(), looks, strict=True)
    ]


def import_folder(out: Path, source: int) -> Path:
    """Where a data set is imported to, the input of that number, if it cannot be read in place."""
    return out / "raw" / f"{source:03d}"


def _kind_of(name: str, url: str, kind: str) -> str:
    """The kind of a file that the input `name` named, where `kind` was asked for."""
    return kind if kind != "auto" and not name.startswith(DATASET) else _kind(url) or "text"


def _named(name: str, kind: str, out: Path, source: int) -> list[str]:
    if name.startswith(DATASET):
        return [str(path) for path in dataset_files(name, import_folder(out, source)) or ()]
    return _urls(name, kind) if scheme_of(name) != "file" else _paths(name, kind, out)


def look(url: str) -> tuple[int, str]:
    """Size and version of a file.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        with open_blob(url) as blob:
            return blob.size, blob.version()
    except StoreError as error:
        lists = scheme_of(url) not in ("file", "http", "https")
        hint = "; end a prefix with / to read all that is below it" if lists else ""
        raise UserError(f"no input '{url}': {error}{hint}") from None


def _kind(url: str) -> str | None:
    name = posixpath.basename(url.partition("?")[0] if url.startswith("http") else url).lower()
    if name in FOLDER:
        return "folder"
    known = [kind for suffix, kind in KINDS.items() if name.endswith(suffix)]
    return known[0] if known else "text" if name.endswith(TEXT_SUFFIXES) else None


def _shards(names: Sequence[str], kind: str, only_known: bool) -> list[str]:
    """Names of shards among `names`, sorted: without directory markers and files that belong to another one."""
    there = set(names)
    with_mds = {posixpath.dirname(name) for name in names if _kind(name) == "mds"}
    with_metadata = {posixpath.dirname(name) for name in names if _kind(name) == "folder"}

    def wanted(name: str) -> bool:
        folder, last = posixpath.split(name)
        stem, suffix = posixpath.splitext(name)
        if not last or (suffix == ".idx" and f"{stem}.bin" in there) or (last == "index.json" and folder in with_mds):
            return False
        if kind != "auto" or not only_known:
            return True
        found = _kind(name)
        if found == "text" and with_metadata:  # a file that the metadata name, or a README
            return not any(above in with_metadata for above in _above(name))
        return found is not None and (suffix != ".bin" or f"{stem}.idx" in there)

    return sorted(filter(wanted, there))


def _above(name: str) -> Iterator[str]:
    """Folders that hold a path or URL, the nearest first."""
    while (folder := posixpath.dirname(name)) != name:
        yield folder
        name = folder


def _urls(name: str, kind: str) -> list[str]:
    prefix = name.endswith("/")
    if not prefix and not _GLOB.search(name.partition("?")[0] if name.startswith("http") else name):
        return [name]
    from millrace.data.stores.listing import list_urls

    try:
        listed = list_urls(name)
    except StoreError as error:
        raise UserError(f"cannot list '{name}': {error}") from None
    found = _shards(listed, kind, only_known=prefix)
    if not found:
        raise UserError(f"no input '{name}': nothing there{_has(listed)}")
    return found


def _paths(name: str, kind: str, out: Path) -> list[str]:
    path = Path(name.removeprefix("file://")).expanduser()
    if path.is_dir():
        return _walk(path, kind, out)
    if path.is_file():
        return [str(path.resolve())]
    matches = [Path(p) for p in glob.glob(str(path), recursive=True)]
    found = _shards([str(p.resolve()) for p in matches if p.is_file()], kind, only_known=False)
    if not found:
        names = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(name, names) or f"; a data set of the hub is written {DATASET}NAME:CONFIG:SPLIT"
        raise UserError(f"no input '{name}': no file, folder or match of that name{hint}")
    return found


def _walk(folder: Path, kind: str, out: Path) -> list[str]:
    names: list[str] = []
    for root, folders, files in os.walk(folder.resolve()):
        folders[:] = [
            f for f in folders if not f.startswith((".", "__pycache__")) and (Path(root) / f).resolve() != out.resolve()
        ]
        names += [os.path.join(root, name) for name in files if not name.startswith(".")]
    found = _shards(names, kind, only_known=True)
    if not found:
        wanted = ", ".join((*KINDS, *TEXT_SUFFIXES))
        raise UserError(
            f"the folder {folder} holds no {wanted} file{_has(names) or ' (it is empty)'}; "
            "name files with a glob to read them as text"
        )
    return found


def _has(names: Sequence[str]) -> str:
    others = sorted({posixpath.splitext(name)[1] or posixpath.basename(name) for name in names})
    return f" (it has: {', '.join(others[:8])})" if others else ""
