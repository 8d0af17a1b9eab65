"""A small object server: `python -m peers.server FOLDER [SECONDS]` prints its port, and serves FOLDER as a bucket.

It speaks what S3 and HTTP clients need to read: GET with Range, HEAD, and ListObjectsV2. Every request waits for
SECONDS before its answer, as it would for the first byte of a store in the same region; the wait takes no CPU. Bodies
leave by `sendfile`, so that one process serves more than the libraries under test take.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import sys
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from peers.job import BUCKET

LATENCY = 0.02
_REASONS = {
    200: "OK",
    206: "Partial Content",
    404: "Not Found",
    405: "Method Not Allowed",
    416: "Range Not Satisfiable",
}


class ObjectServer:
    """Serves `folder` as the bucket `bench`, path style."""

    def __init__(self, folder: Path, latency: float = LATENCY) -> None:
        self._folder, self._latency = folder.resolve(), latency

    async def serve(self, port: int = 0) -> asyncio.Server:
        """Listen on loopback; the port is chosen where it is 0."""
        return await asyncio.start_server(self._connection, "127.0.0.1", port)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n"):
                method, target, _ = head[0].split(" ", 2)
                headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
                await reader.readexactly(int(headers.get("content-length", 0)))
                await asyncio.sleep(self._latency)
                await self._answer(writer, method, target, headers)
                if headers.get("connection", "").lower() == "close":
                    break
        writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, method: str, target: str, headers: dict[str, str]) -> None:
        url = urlsplit(target)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        path = (self._folder / key).resolve()
        if method not in ("GET", "HEAD"):
            return await _send(writer, 405, {})
        if bucket == BUCKET and not key:
            text = self._listing({name: values[0] for name, values in parse_qs(url.query).items()})
            return await _send(writer, 200, {"Content-Type": "application/xml"}, text if method == "GET" else b"")
        if bucket != BUCKET or not path.is_relative_to(self._folder) or not path.is_file():
            code = b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>" if method == "GET" else b""
            return await _send(writer, 404, {"Content-Type": "application/xml"}, code)
        await _send_file(writer, path, method, headers.get("range"))

    def _listing(self, query: dict[str, str]) -> bytes:
        """ListObjectsV2 of everything below a prefix, in one page; a delimiter folds what lies deeper."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        files = {str(p.relative_to(self._folder)): p for p in sorted(self._folder.rglob("*")) if p.is_file()}
        found, folded = [], set()
        for key, path in files.items():
            if not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folded.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                found.append((key, path))
        items = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{_etag(path)}&quot;</ETag><Size>{path.stat().st_size}</Size></Contents>"
            for key, path in found
        ) + "".join(f"<CommonPrefixes><Prefix>{escape(p)}</Prefix></CommonPrefixes>" for p in sorted(folded))
        return (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>{BUCKET}</Name>'
            f"<Prefix>{escape(prefix)}</Prefix><KeyCount>{len(found) + len(folded)}</KeyCount>"
            f"<MaxKeys>1000000</MaxKeys><IsTruncated>false</IsTruncated>{items}</ListBucketResult>"
        ).encode()


def byte_range(asked: str | None, size: int) -> tuple[int, int] | None:
    """(first byte, byte after the last) of a Range header; None where it cannot be met.

    One range as in RFC 9110, section 14.1.2: `bytes=2-5`, `bytes=2-` or `bytes=-5`.
    """
    if asked is None or not asked.startswith("bytes=") or "," in asked:
        return 0, size
    first, _, last = asked[6:].partition("-")
    if not first:
        return (max(0, size - int(last)), size) if int(last) and size else None
    start, stop = int(first), min(int(last) + 1, size) if last else size
    return (start, stop) if start < stop else None


async def _send_file(writer: asyncio.StreamWriter, path: Path, method: str, asked: str | None) -> None:
    status = path.stat()
    headers = {
        "ETag": f'"{_etag(path)}"',
        "Last-Modified": email.utils.formatdate(status.st_mtime, usegmt=True),
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
    }
    part = byte_range(asked, status.st_size)
    if part is None:
        return await _send(writer, 416, headers | {"Content-Range": f"bytes */{status.st_size}"})
    start, stop = part
    code = 200 if asked is None else 206
    if code == 206:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{status.st_size}"
    await _send(writer, code, headers, length=stop - start)
    if method == "GET" and stop > start:
        with open(path, "rb") as file:
            await asyncio.get_running_loop().sendfile(writer.transport, file, start, stop - start)


async def _send(
    writer: asyncio.StreamWriter, code: int, headers: dict[str, str], body: bytes = b"", length: int | None = None
) -> None:
    lines = [f"HTTP/1.1 {code} {_REASONS[code]}", "Server: bench", f"Date: {email.utils.formatdate(usegmt=True)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    await writer.drain()


def _etag(path: Path) -> str:
    status = path.stat()
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


async def _main(folder: Path, latency: float) -> None:
    server = await ObjectServer(folder, latency).serve()
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else LATENCY))
