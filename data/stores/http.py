"""Files behind http:// and https://, read by range; every host on the way is checked before it gets a request.

obstore would follow redirects anywhere, so these requests are made with urllib3.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urljoin
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.util import Timeout, make_headers, parse_url

from millrace.data.stores.base import StoreError
from millrace.data.stores.guard import LinkLocal, is_link_local, refuse_link_local
from millrace.data.stores.remote import RemoteBlob
from millrace.data.stores.waiting import PATIENCE, Patience, Transient, persist

_REDIRECTS = 5
_STEP = 256 * 2**10  # bytes between two looks at the clock


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """Bytes of a file, its size and version, and the URL that gave them after all redirects."""

    data: bytes
    size: int
    version: str
    url: str


class _NotTheRange(StoreError):
    """The answer is a page or the whole file."""


class HttpBlob(RemoteBlob):
    """A file of a server that serves byte ranges; `headers` go to its own host only, not to those it redirects to."""

    def __init__(self, url: str, headers: Mapping[str, str] | None = None, patience: Patience = PATIENCE) -> None:
        self.url, self.patience, self._headers = url, patience, dict(headers or {})
        self.host, self._source = host_of(url), url
        first = persist(lambda end: self._request(url, (0, 1), end), url, self.host, patience)
        self.size, self._version, self._target = first.size, first.version, first.url

    def version(self) -> str:
        """The ETag, or the time of the last change; empty where the server tells neither."""
        return self._version

    def _attempt(self, start: int, stop: int, end: float) -> bytes:
        try:
            answer = self._request(self._target, (start, stop), end)
        except _NotTheRange as error:  # it was, when the file was opened: a page of a proxy, or of maintenance
            raise Transient(str(error), answered=True) from None
        except StoreError:
            if self._target == self._source:
                raise
            answer = self._request(self._source, (start, stop), end)  # the address signed for a while is no more valid
        self._target = answer.url
        if not self._same(answer):
            raise self._changed()
        return answer.data

    def _same(self, answer: HttpAnswer) -> bool:
        return (answer.size, answer.version) == (self.size, self._version)

    def _request(self, url: str, span: tuple[int, int], end: float) -> HttpAnswer:
        for _ in range(_REDIRECTS + 1):
            headers = {"Range": f"bytes={span[0]}-{span[1] - 1}", "Accept-Encoding": "identity"}
            headers |= self._headers if host_of(url) == self.host else {}
            with self._send(url, headers) as response:
                if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                    url = urljoin(url, response.headers["Location"])
                    _body(response, _STEP, end)  # to its end, so that the connection can be used again
                    continue
                return self._answer(url, response, span, end)
        raise StoreError(f"cannot read {self.url}: it redirects more than {_REDIRECTS} times, last to {url}")

    def _send(self, url: str, headers: Mapping[str, str]) -> contextlib.closing[urllib3.BaseHTTPResponse]:
        timeout = Timeout(connect=min(10, self.patience.stall), read=self.patience.stall)
        try:
            pool = _pool(_proxy(url), os.getpid())
            return contextlib.closing(
                pool.request(
                    "GET", url, headers=headers, timeout=timeout, redirect=False, retries=False, preload_content=False
                )
            )
        except LinkLocal as error:
            raise StoreError(f"{self.url} is refused: {error}") from None
        except urllib3.exceptions.HTTPError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise StoreError(f"cannot read {self.url}: {error}") from None
            connected = isinstance(error, urllib3.exceptions.ReadTimeoutError | urllib3.exceptions.ProtocolError)
            what = re.sub(r"^\w+\(host='.*?', port=\w+\): ", "", str(error))
            raise Transient(what, answered=connected) from None

    def _answer(self, url: str, response: urllib3.BaseHTTPResponse, span: tuple[int, int], end: float) -> HttpAnswer:
        headers = response.headers
        version = headers.get("ETag") or headers.get("Last-Modified") or ""
        total = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", headers.get("Content-Range", ""))
        empty = headers.get("Content-Length") == "0" if response.status == 200 else response.status == 416
        if empty and (total is None or total[2] == "0"):
            return HttpAnswer(b"", 0, version, url)
        if response.status == 206 and total and total[1] == str(span[0]):
            data = _body(response, span[1] - span[0], end)
            return HttpAnswer(data, int(total[2]), version, url)
        if response.status == 416:
            raise self._changed()
        if response.status in (200, 206):
            kind = headers.get("Content-Type", "something")
            raise _NotTheRange(
                f"cannot read {self.url}: it answers {response.status} with {kind}, not with the bytes asked for; the "
                "server does not serve byte ranges (nginx and Caddy do)"
            )
        why = f"{response.status} {response.reason}"
        if response.status in (408, 429) or response.status >= 500:
            pause = headers.get("Retry-After", "")
            raise Transient(why, answered=True, pause=float(pause) if pause.isdigit() else 0.0)
        raise StoreError(f"cannot read {self.url}: {why}")


def _body(response: urllib3.BaseHTTPResponse, length: int, end: float) -> bytes:
    """At most `length` bytes of the answer; raises `Transient` where it stops too early or takes too long."""
    parts, got = [], 0
    try:
        while got < length and (part := response.read(min(_STEP, length - got), decode_content=False)):
            parts.append(part)
            got += len(part)
            if time.monotonic() > end:
                raise Transient(f"got {got} of {length} bytes in time", answered=True)
    except urllib3.exceptions.HTTPError as error:
        raise Transient(f"got {got} of {length} bytes: {error}", answered=True) from None
    return b"".join(parts)


def host_of(url: str) -> str:
    """ "https://host:port" of a URL.

    Raises:
        StoreError: not a URL of HTTP, or with a name and password in it.
    """
    try:
        parts = parse_url(url)
    except urllib3.exceptions.LocationParseError as error:
        raise StoreError(f"{url} is not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.host:
        raise StoreError(f"{url} is not a URL of http:// or https://")
    if parts.auth:
        raise StoreError(f"a URL at {parts.host} holds a name or password, which would end up in files and messages")
    return f"{parts.scheme}://{parts.netloc}"


class _Checked:
    """Checks the host before a connection is made, and the address that it was made to before anything is sent."""

    def connect(self) -> None:
        refuse_link_local(self.host)  # type: ignore[attr-defined]
        super().connect()  # type: ignore[misc]
        address = self.sock.getpeername()[0]  # type: ignore[attr-defined]
        if is_link_local(address):
            self.close()  # type: ignore[attr-defined]
            raise LinkLocal(f"{self.host} is the link-local address {address}")  # type: ignore[attr-defined]


class _HttpConnection(_Checked, HTTPConnection):
    pass


class _HttpsConnection(_Checked, HTTPSConnection):
    pass


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HttpConnection


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HttpsConnection


@lru_cache(maxsize=8)
def _pool(proxy: str | None, pid: int) -> urllib3.PoolManager:
    """Connections of this process (a forked one must not share them), through `proxy` if there is one."""
    if proxy is not None:
        auth = parse_url(proxy).auth
        headers = make_headers(proxy_basic_auth=auth) if auth else None
        return urllib3.ProxyManager(proxy, proxy_headers=headers, num_pools=64, maxsize=64)
    pool = urllib3.PoolManager(num_pools=64, maxsize=64)
    pool.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
    return pool


def _proxy(url: str) -> str | None:
    """The environment's proxy for `url` (HTTPS_PROXY, NO_PROXY, …); what it is asked for is checked here."""
    parts = parse_url(url)
    proxy = getproxies().get(parts.scheme or "")
    if not proxy or proxy_bypass(parts.host or ""):
        return None
    refuse_link_local(parts.host or "")
    return proxy
