"""Blobs behind a network, and those in S3, Google Cloud Storage and Azure, which obstore reads.

Credentials, regions and endpoints come from the environment (AWS_*, GOOGLE_*, AZURE_*) or the machine's role, never
from a configuration.
"""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from millrace.data.stores.base import Blob, Buffer, StoreError, scheme_of
from millrace.data.stores.guard import LinkLocal, refuse_link_local
from millrace.data.stores.waiting import PATIENCE, Patience, Transient, persist

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")

# Per scheme: obstore's class, the variables that name another endpoint, and the one that allows it to be plain HTTP.
_STORES = {
    "s3": ("S3Store", ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"), "AWS_ALLOW_HTTP"),
    "gs": ("GCSStore", ("GOOGLE_BASE_URL",), "GOOGLE_ALLOW_HTTP"),
    "az": ("AzureStore", ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"), "AZURE_ALLOW_HTTP"),
}
_NO_PROXY_THERE = "http://127.0.0.1:1"
_HOPELESS = re.compile(r"status code: 4(?!08|29)|redirect without LOCATION|builder error|MissingRegion")
_METADATA = re.compile(r"/latest/(api/token|meta-data)|computeMetadata|/metadata/identity")
_runtime_pid = 0


class RemoteBlob(Blob):
    """A blob whose reads are retried, bounded in time, and complete or an error; `host` is what answers or does not."""

    host: str
    patience: Patience

    def read(self, start: int, length: int) -> bytes:
        """Read by one request, made again for as long as `patience` lasts."""
        return bytes(self.view(start, length))

    def view(self, start: int, length: int) -> Buffer:
        """As `read`, in the buffer of the client: a copy costs more than the request."""
        stop = start + length
        self.check_range(start, stop)
        if not length:
            return b""

        def attempt(end: float) -> Buffer:
            data = self._attempt(start, stop, end)
            if len(data) != length:
                raise Transient(f"got {len(data)} of {length} bytes", answered=True)
            return data

        return persist(attempt, f"{self.url} (bytes {start} to {stop})", self.host, self.patience)

    @abstractmethod
    def _attempt(self, start: int, stop: int, end: float) -> Buffer:
        """Bytes [start, stop), by one request that is over at `end` (monotonic clock).

        Raises:
            Transient: it failed in a way that may pass.
            StoreError: it failed for good, or the object changed since it was opened.
        """

    def _changed(self) -> StoreError:
        return StoreError(f"{self.url} changed after it was opened; open it again")

    def close(self) -> None:
        """Nothing: connections belong to the process."""


class ObjectBlob(RemoteBlob):
    """An object; `url` is SCHEME://BUCKET/KEY, with the key as it is: nothing in it is decoded."""

    def __init__(self, url: str, patience: Patience = PATIENCE) -> None:
        self.url, self.patience = url, patience
        self.host, self._key = split_url(url)
        self._store = object_store(self.host, patience)
        meta = ask(lambda: _head(self._store, self._key), url, patience)
        self.size, self._etag, self._modified = int(meta["size"]), meta["e_tag"], meta["last_modified"]

    def version(self) -> str:
        """The ETag, or the time of the last change where there is none."""
        return str(self._etag or self._modified)

    def _attempt(self, start: int, stop: int, end: float) -> Buffer:
        return judged(lambda: self._get(start, stop), self.url)

    def _get(self, start: int, stop: int) -> Buffer:
        import obstore

        result = obstore.get(self._store, self._key, options={"range": (start, stop), "if_match": self._etag})
        if (result.meta["size"], result.meta["e_tag"]) != (self.size, self._etag):
            raise self._changed()
        return memoryview(result.bytes())


def split_url(url: str) -> tuple[str, str]:
    """("s3://bucket", "key") of "s3://bucket/key".

    Raises:
        StoreError: no bucket in it.
    """
    bucket, _, key = url.partition("://")[2].partition("/")
    if not bucket:
        raise StoreError(f"{url} names no bucket: write {scheme_of(url)}://BUCKET/KEY")
    return f"{scheme_of(url)}://{bucket}", key


def ask(question: Callable[[], T], url: str, patience: Patience) -> T:
    """Ask obstore something about `url`, with retries.

    Raises:
        StoreError: it cannot be answered, or not within the deadline.
    """
    return persist(lambda end: judged(question, url), url, split_url(url)[0], patience)


@lru_cache(maxsize=64)
def object_store(root: str, patience: Patience, retries: int = 0) -> ObjectStore:
    """The store of "s3://bucket", one per process, so that its connections are shared.

    Reads are made again by `persist`; what is written in parts needs `retries` of each request by the client itself.
    """
    from obstore import exceptions, store

    scheme, _, bucket = root.partition("://")
    options: dict[str, Any] = {
        "client_options": _client(scheme, patience),
        "retry_config": {"max_retries": retries, "retry_timeout": timedelta(seconds=patience.deadline * bool(retries))},
    }
    if scheme == "s3" and os.environ.get("AWS_PROFILE") and not os.environ.get("AWS_ACCESS_KEY_ID"):
        options["credential_provider"] = _profile()
    try:
        made: ObjectStore = getattr(store, _STORES[scheme][0])(bucket, **options)
    except (exceptions.BaseError, ValueError) as error:
        raise StoreError(f"cannot open {root}: {_reason(error)}; {_credentials(root)}") from None
    return made


def _client(scheme: str, patience: Patience) -> dict[str, Any]:
    """Options of obstore's client, which follows redirects, and has no option against that.

    With TLS, nobody but the store can send one, and only to another host with TLS. Without, anybody on the way could:
    all hosts but the endpoint are put behind a proxy that does not exist.
    """
    client: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=min(10, patience.stall)),
        "read_timeout": timedelta(seconds=patience.stall),
        "timeout": timedelta(seconds=patience.deadline),
    }
    _, variables, allow = _STORES[scheme]
    for name in variables:
        endpoint = urlsplit(os.environ.get(name, ""))
        try:
            refuse_link_local(endpoint.hostname or "")
        except LinkLocal as error:
            raise StoreError(f"{name} is refused: {error}") from None
        if endpoint.scheme == "http":
            if os.environ.get(allow, "").lower() not in ("1", "true", "yes", "on"):
                raise StoreError(f"{name} is plain HTTP; set {allow}=true if it may be, or use https://")
            client |= {"allow_http": True, "proxy_url": _NO_PROXY_THERE, "proxy_excludes": endpoint.hostname}
    return client


def _profile() -> Any:
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise StoreError(
            "AWS_PROFILE is set, and profiles are read by boto3, which is missing: install it, or set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    return Boto3CredentialProvider()


def _head(store: ObjectStore, key: str) -> Any:
    import obstore

    return obstore.head(store, key)


def judged(request: Callable[[], T], url: str, verb: str = "read") -> T:
    """Do `request`, and tell failures that may pass from those that will not; `verb` is what is done with `url`.

    Raises:
        Transient: it may pass.
        StoreError: it will not; says which URL and why, and no credentials.
    """
    from obstore import exceptions

    _refuse_fork(url)
    try:
        return request()
    except FileNotFoundError:
        raise StoreError(f"{url} does not exist") from None
    except exceptions.PreconditionError:
        raise StoreError(f"{url} changed after it was opened; open it again") from None
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        said = "read" if verb == "read" else "written"
        raise StoreError(f"{url} may not be {said}: {_reason(error)}; {_credentials(url)}") from None
    except exceptions.GenericError as error:
        text = str(error)
        if _METADATA.search(text):
            raise Transient(f"no credentials in the environment or from the machine; {_credentials(url)}") from None
        if _HOPELESS.search(text):
            raise StoreError(f"cannot {verb} {url}: {_reason(error)}") from None
        connected = re.search(r"status code|kind: (Interrupted|Timeout)", text) and "ConnectError" not in text
        raise Transient(_reason(error), answered=bool(connected)) from None
    except (exceptions.BaseError, ValueError) as error:
        raise StoreError(f"cannot {verb} {url}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """The first line of obstore's message, and the innermost cause that its debug text has."""
    first, _, debug = str(error).partition("\n")
    kind = re.search(r"kind: (Connect|Timeout|Interrupted)", debug)
    cause = re.search(r'error: "([^"]+)"|message: "([^"]+)"', debug)
    details = [kind[1].lower()] if kind else []
    details += [next(filter(None, cause.groups()))] if cause else []
    return first.strip().rstrip(":") + (f" ({', '.join(details)})" if details else "")


def _credentials(url: str) -> str:
    return {
        "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
        "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
        "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_SKIP_SIGNATURE=true",
    }.get(scheme_of(url), "see who owns it")


def _refuse_fork(url: str) -> None:
    """obstore's threads do not survive a fork: a read in the child would wait forever."""
    global _runtime_pid
    _runtime_pid = _runtime_pid or os.getpid()
    if _runtime_pid != os.getpid():
        raise StoreError(
            f"cannot ask for {url} in a process that was forked after its parent had read from a store; start "
            "worker processes with the method 'spawn' or 'forkserver'"
        )
