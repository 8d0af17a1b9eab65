"""Data sets of the Hugging Face hub, from a server that looks like it, which HF_ENDPOINT names to other processes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from typing import Any

import pytest

DATA = random.Random(6).randbytes(100_000)
SHA, OLD = "a" * 40, "b" * 40


@pytest.fixture
def hub(server: Any, serve: Any) -> Any:
    """A hub that keeps a file's content elsewhere, as the real one does."""
    content = serve()
    content.files["/blob"] = DATA
    listing = [
        {"type": "file", "oid": "0" * 40, "size": len(DATA), "path": "data/1.parquet"},
        {"type": "file", "oid": "1" * 40, "size": 5, "path": "data/2.jsonl"},
        {"type": "directory", "oid": "2" * 40, "size": 0, "path": "data/more"},
    ]
    more = [{"type": "file", "oid": "3" * 40, "size": 7, "path": "data/more/3.parquet"}]
    api = "/api/datasets/mill/race"
    for revision, sha in (("main", SHA), (SHA, SHA), ("v1", OLD), (OLD, OLD)):
        server.files[f"{api}/revision/{revision}"] = json.dumps({"id": "mill/race", "sha": sha}).encode()
    for sha in (SHA, OLD):
        server.files[f"{api}/tree/{sha}/data"] = json.dumps(listing).encode()
        server.files[f"{api}/tree/{sha}/data/more"] = json.dumps(more).encode()
    server.content = content

    def fault(number: int, path: str) -> str:
        if path.startswith("/datasets/mill/race/resolve/"):
            return f"302 {content.url}/blob?{number}"
        if "recursive=true" in path.lower() and "/data?" in path:
            server.files[f"{api}/tree/{SHA}/data"] = json.dumps(listing + more).encode()
        return ""

    server.fault = fault
    return server


def ask(hub: Any, code: str) -> list[Any]:
    """What `code` appends to `out`, run in another process."""
    lead = (
        "import json\nfrom millrace.data.stores.base import open_blob, StoreError\n"
        "from millrace.data.stores.hub import HubBlob\nfrom millrace.data.stores.waiting import Patience\n"
        "from millrace.data.stores.listing import list_urls\nout = []\n"
        "quick = Patience(stall=1, deadline=2, unknown=2, pause=0.01, longest_pause=0.05)\n"
        "def error(url):\n"
        "    try: return HubBlob(url, quick).size\n"
        "    except StoreError as error: return str(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HOME": os.environ["MILLRACE_CACHE"]}
    done = subprocess.run(
        [sys.executable, "-c", f"{lead}{code}\nprint(json.dumps(out))"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_reads_at_a_commit(hub: Any) -> None:
    code = (
        "blob = open_blob('hf://datasets/mill/race/data/1.parquet')\n"
        "old = open_blob('hf://datasets/mill/race@v1/data/1.parquet')\n"
        "out += [blob.size, blob.version(), blob.url, blob.read(5, 100).hex(), old.read(0, 3).hex()]"
    )
    url = "hf://datasets/mill/race/data/1.parquet"
    assert ask(hub, code) == [len(DATA), "0" * 40, url, DATA[5:105].hex(), DATA[:3].hex()]
    resolved = [path for _, path, _ in hub.log if "/resolve/" in path]
    assert resolved == [f"/datasets/mill/race/resolve/{sha}/data/1.parquet" for sha in (SHA, OLD)]
    assert {h.get("authorization") for _, path, h in hub.log if "/datasets/" in path} == {"Bearer hf_secret"}
    assert {h.get("authorization") for _, _, h in hub.content.log} == {None}
    assert len([path for _, path, _ in hub.log if "/tree/" in path]) == 2  # one listing for all files of a folder


def test_lists(hub: Any) -> None:
    base = "hf://datasets/mill/race"
    code = (
        f"out += [list_urls('{base}/data/*.parquet'), list_urls('{base}/data/'), list_urls('{base}@main/data/**/3*')]"
    )
    flat = [f"{base}/data/1.parquet", f"{base}/data/2.jsonl", f"{base}/data/more/3.parquet"]
    assert ask(hub, code) == [flat[:1], flat, [f"{base}@main/data/more/3.parquet"]]


def test_errors(hub: Any) -> None:
    names = ["datasets/mill/race/data/9.parquet", "datasets/mill/race/data/more", "datasets/mill/none/x"]
    names += ["datasets/mill/race@v9/x", "mill/model/x", "datasets/mill/race", "datasets/"]
    found = ask(hub, f"out += [error('hf://' + name) for name in {names}]")
    words = ["does not exist", "is a folder", "404", "404", "is no data set", "names no file", "cannot be read"]
    for name, said, word in zip(names, found, words, strict=True):
        assert word in said and f"hf://{name.partition('@')[0].removesuffix('/x')}" in said, said


def test_a_hub_that_fails(hub: Any) -> None:
    works = hub.fault
    hub.fault = lambda number, path: "503" if number % 2 == 0 else works(number, path)
    assert ask(hub, "out.append(open_blob('hf://datasets/mill/race/data/1.parquet').read(7, 3).hex())") == [
        DATA[7:10].hex()
    ]
    hub.fault = lambda number, path: "503"
    (said,) = ask(hub, "out.append(error('hf://datasets/mill/race/data/1.parquet'))")
    assert "tried" in said and "503" in said


def test_offline(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os; os.environ['HF_HUB_OFFLINE'] = '1'\nout.append(error('hf://datasets/mill/race/data/1.parquet'))"
    (said,) = ask(hub, code)
    assert "HF_HUB_OFFLINE is set" in said and hub.log == []
