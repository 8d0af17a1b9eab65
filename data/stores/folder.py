"""Folders of an object store: small objects are read whole, files are written in parts.

Unlike shards of data, which are read by range through the node's cache, see `RemoteBlob`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from millrace.core.errors import UserError
from millrace.core.registry import lookup
from millrace.data.stores.base import Blob, StoreError, scheme_of
from millrace.data.stores.waiting import PATIENCE, Patience, Transient

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")

SCHEMES = ("s3", "gs", "az", "file")
RETRIES = 10  # of each request, a part of a file for one, within the deadline
_PART, _PARTS = 8 * 2**20, 9000  # bytes of a part, unless S3's 10,000 of an object would not do
_AT_ONCE = 4  # parts on their way, and in memory


class RemoteFolder:
    """The folder `url`, SCHEME://BUCKET/PREFIX or file:///PATH; names are those of objects below it.

    Every method raises `StoreError` where the store refuses or does not answer; none waits without end.
    """

    def __init__(self, url: str, patience: Patience = PATIENCE) -> None:
        if why := check_url(url):
            raise UserError(f"{url} is no folder of an object store: {why}")
        self.url, self._patience = url.rstrip("/"), patience

    def put(self, name: str, source: Path | bytes) -> None:
        """Write an object, as a whole or not at all; a file is read and sent in parts."""
        import obstore

        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        part = max(_PART, -(-size // _PARTS))
        self._ask(
            lambda store, key: obstore.put(store, key, source, chunk_size=part, max_concurrency=_AT_ONCE), name, "write"
        )

    def get(self, name: str, most: int) -> bytes | None:
        """An object of `most` bytes at most; None where there is none."""
        import obstore

        def read(store: ObjectStore, key: str) -> bytes | None:
            try:
                found = obstore.get(store, key)
            except FileNotFoundError:
                return None
            if found.meta["size"] > most:
                raise StoreError(f"{self.url}/{name} has {found.meta['size']} bytes, more than {most}")
            return bytes(found.bytes())

        return self._ask(read, name, "read")

    def delete(self, name: str) -> None:
        """Remove an object."""
        import obstore

        self._ask(lambda store, key: obstore.delete(store, key), name, "remove")

    def folders(self) -> list[str]:
        """Names of the folders in it."""
        import obstore

        found: Any = self._ask(lambda store, key: obstore.list_with_delimiter(store, key or None), "", "list")
        return [path.rpartition("/")[2] for path in found["common_prefixes"]]

    def blob(self, name: str) -> Blob:
        """An object that is read by range, with retries, past the node's cache."""
        from millrace.data import STORES

        url, store = f"{self.url}/{name}", lookup(STORES, scheme_of(self.url), "store")
        opened: Blob = store(url) if scheme_of(url) == "file" else store(url, self._patience)
        return opened

    def _ask(self, question: Callable[[ObjectStore, str], T], name: str, verb: str) -> T:
        from millrace.data.stores.remote import judged, object_store, split_url

        url = f"{self.url}/{name}" if name else self.url
        if scheme_of(url) == "file":
            store, key = _disk(), url.removeprefix("file://").strip("/")
        else:
            root, key = split_url(url)
            store = object_store(root, self._patience, RETRIES)
        try:
            return judged(lambda: question(store, key), url, verb)
        except Transient as error:
            raise StoreError(f"cannot {verb} {url}: {error}") from None


@lru_cache
def _disk() -> ObjectStore:
    from obstore.store import LocalStore

    return LocalStore()


def check_url(url: str) -> str:
    """Why `url` is no folder of an object store; empty where it is one. Asks nobody."""
    scheme, mark, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if not mark or scheme not in SCHEMES:
        return f"write a URL of {', '.join(f'{scheme}://' for scheme in SCHEMES)}"
    if scheme == "file" and (bucket or not key):
        return "write file:///ABSOLUTE/PATH"
    if scheme != "file" and not bucket:
        return f"write {scheme}://BUCKET/PREFIX"
    if re.search(r"[@?#\s]", rest) or (key and any(part in ("", ".", "..") for part in key.rstrip("/").split("/"))):
        return "write a bucket and a plain prefix; credentials come from the environment"
    return ""
