"""A hub on loopback with one data set, as far as `datasets` and `huggingface_hub` ask: files at one commit."""

from __future__ import annotations

import hashlib
import json
import posixpath
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

REPO, COMMIT = "mill/race", "c" * 40


class LocalHub(ThreadingHTTPServer):
    """Serves `files` ({path in the data set: content}); `log` has (method, path) of every request."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.log = files, list[tuple[str, str]]()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=lambda: self.serve_forever(0.02), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._route(self.rfile.read(int(self.headers["Content-Length"])))

    def _route(self, body: bytes) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.log.append((self.command, path))
        api, files = f"/api/datasets/{REPO}", f"/datasets/{REPO}/resolve/"
        if path.startswith(files):
            return self._file(path.removeprefix(files).partition("/")[2])
        if path.startswith(f"{api}/tree/"):
            return self._json(self._tree(path.removeprefix(f"{api}/tree/").partition("/")[2]))
        if path.startswith(f"{api}/paths-info/"):
            asked = parse_qs(body.decode()).get("paths") or json.loads(body).get("paths")
            return self._json([entry for entry in self._entries() if entry["path"] in asked])
        if path == api or path.startswith(f"{api}/revision/"):
            return self._json({"id": REPO, "sha": COMMIT, "siblings": [], "private": False, "tags": [], "downloads": 0})
        self._missing("RepoNotFound")

    def _entries(self) -> list[dict[str, Any]]:
        files = [
            {"type": "file", "oid": hashlib.sha1(raw).hexdigest(), "size": len(raw), "path": path}
            for path, raw in sorted(self.server.files.items())
        ]
        folders = {above for path in self.server.files for above in _above(path)}
        return files + [{"type": "directory", "oid": "0" * 40, "size": 0, "path": f} for f in sorted(folders)]

    def _tree(self, folder: str) -> list[dict[str, Any]]:
        deep = "recursive=true" in self.path.lower()
        prefix = f"{folder}/" if folder else ""
        return [
            entry
            for entry in self._entries()
            if entry["path"].startswith(prefix) and (deep or "/" not in entry["path"].removeprefix(prefix))
        ]

    def _file(self, path: str) -> None:
        raw = self.server.files.get(path)
        if raw is None:
            return self._missing("EntryNotFound")
        first, last = 0, len(raw) - 1
        if span := self.headers.get("Range"):
            start, _, stop = span.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(stop or last), last)
        headers = {"ETag": f'"{hashlib.sha1(raw).hexdigest()}"', "Accept-Ranges": "bytes"}
        if span:
            headers["Content-Range"] = f"bytes {first}-{last}/{len(raw)}"
        self._answer(206 if span else 200, raw[first : last + 1], headers)

    def _missing(self, code: str) -> None:
        self._answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not here"})

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _above(path: str) -> list[str]:
    found = []
    while path := posixpath.dirname(path):
        found.append(path)
    return found
