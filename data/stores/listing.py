"""URLs behind a prefix or a glob of a remote store."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from millrace.core.errors import UserError
from millrace.data import STORES
from millrace.data.stores.base import scheme_of
from millrace.data.stores.waiting import PATIENCE

_GLOB = re.compile(r"[*?\[]")


def list_urls(pattern: str) -> list[str]:
    """URLs, sorted, of a prefix that ends in "/" (all that lies below), of a glob, or of one object.

    In a glob `*`, `?` and `[…]` stay within one part of a path, and `**` stands for any number of parts.

    Raises:
        UserError: nothing there; a scheme that no store is registered for, or that cannot list.
        StoreError: the store does not answer, or refuses to.
    """
    scheme = scheme_of(pattern)
    if scheme in ("http", "https"):
        if pattern.endswith("/") or "*" in pattern:
            raise UserError(f"{pattern}: a web server has no list of its files; name each URL of {scheme}://")
        return [pattern]
    if scheme not in STORES or scheme == "file":
        raise UserError(f"cannot list {pattern}: no remote store has '{scheme}://'")
    if not pattern.endswith("/") and not _GLOB.search(pattern):
        return [pattern]
    found = sorted(_hub(pattern) if scheme == "hf" else _objects(pattern))
    if not found:
        raise UserError(f"nothing matches {pattern}")
    return found


def _objects(pattern: str) -> Iterator[str]:
    import obstore

    from millrace.data.stores.remote import ask, object_store, split_url

    root, wanted = split_url(pattern)
    store = object_store(root, PATIENCE)
    listed: Any = ask(
        lambda: obstore.list(store, _folder(wanted) or None, chunk_size=1000).collect(), pattern, PATIENCE
    )
    folders = {path[: path.rindex("/")] for meta in listed if "/" in (path := meta["path"])}
    for meta in listed:
        marker = meta["size"] == 0 and meta["path"] in folders  # some tools make an empty object for a folder
        if _matches(meta["path"], wanted) and not marker:
            yield f"{root}/{meta['path']}"


def _hub(pattern: str) -> Iterator[str]:
    from millrace.data.stores.hub import ask_hub, commit_of, split_hub_url

    repo, revision, wanted = split_hub_url(pattern)
    wanted += "/" if pattern.endswith("/") and wanted else ""
    root = f"datasets/{repo}@{commit_of(repo, revision, PATIENCE)}/"
    names = ask_hub(lambda fs: fs.find(root + _folder(wanted)), pattern, PATIENCE)
    prefix = pattern.removesuffix(wanted)
    yield from (prefix + path for name in names if _matches(path := name.removeprefix(root), wanted))


def _folder(wanted: str) -> str:
    """The part of a pattern that is a folder without wildcards."""
    match = _GLOB.search(wanted)
    return wanted[: match.start() if match else None].rpartition("/")[0]


def _matches(path: str, wanted: str) -> bool:
    if not wanted or wanted.endswith("/"):
        return path.startswith(wanted)
    return _parts_match(path.split("/"), wanted.split("/"))


def _parts_match(path: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return not path
    if wanted == ["**"]:
        return bool(path)
    if wanted[0] == "**":
        return any(_parts_match(path[n:], wanted[1:]) for n in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], wanted[0]) and _parts_match(path[1:], wanted[1:])
