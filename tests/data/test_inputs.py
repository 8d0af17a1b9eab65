"""What inputs may be: names, kinds, and URLs of a store that is not a disk."""

from __future__ import annotations

import fnmatch
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from millrace.core.errors import UserError
from millrace.data import STORES
from millrace.data.inputs import name_inputs, resolve
from millrace.data.manifest import Manifest
from millrace.data.prepare import PrepareConfig, Summary, prepare
from millrace.data.stores.base import Blob, StoreError


def run(out: Path, *sources: object, **options: Any) -> Summary:
    values = {"vocab_size": 300} | options
    return prepare(PrepareConfig(inputs=[str(s) for s in sources], out=str(out), **values))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Objects by URL, in a store for mem:// whose version is a hash of the content."""
    objects: dict[str, bytes] = {}

    class MemoryBlob(Blob):
        def __init__(self, url: str) -> None:
            if url not in objects:
                raise StoreError(f"there is no {url}")
            self.url, self._content = url, objects[url]
            self.size = len(self._content)

        def read(self, start: int, length: int) -> bytes:
            return self._content[start : start + length]

        def version(self) -> str:
            return str(hash(self._content))

        def close(self) -> None:
            pass

    def list_urls(pattern: str) -> list[str]:
        wanted = f"{pattern}*" if pattern.endswith("/") else pattern
        return [url for url in objects if fnmatch.fnmatchcase(url, wanted)]

    store, listing = ModuleType("memory_store"), ModuleType("millrace.data.stores.listing")
    store.MemoryBlob, listing.list_urls = MemoryBlob, list_urls  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, store.__name__, store)
    monkeypatch.setitem(sys.modules, listing.__name__, listing)
    monkeypatch.setitem(STORES, "mem", "memory_store:MemoryBlob")
    return objects


def jsonl(*texts: str) -> bytes:
    return "".join(f'{{"text": "{text}"}}\n' for text in texts).encode()


def test_urls_are_indexed_read_and_appended_to(bucket: dict[str, bytes], corpora: Any, tmp_path: Path) -> None:
    bucket["mem://web/2024/b.jsonl"] = jsonl("two", "three")
    bucket["mem://web/2024/a.jsonl"] = jsonl("one")
    bucket["mem://web/2024/_SUCCESS"] = b""
    bucket["mem://web/2024/"] = b""
    first = run(tmp_path / "out", "mem://web/2024/")
    manifest = Manifest.load(tmp_path / "out")
    assert [manifest.shard_url(i) for i in range(2)] == ["mem://web/2024/a.jsonl", "mem://web/2024/b.jsonl"]
    assert [s["name"] for s in first.train] == ["2024"]
    assert [r["text"] for r in corpora.read_samples(tmp_path / "out")] == ["one", "two", "three"]
    bucket["mem://web/2024/aa.jsonl"] = jsonl("four")
    assert run(tmp_path / "out", "mem://web/2024/").added_files == 1
    assert [r["text"] for r in corpora.read_samples(tmp_path / "out")] == ["one", "two", "three", "four"]
    bucket["mem://web/2024/b.jsonl"] = jsonl("two", "other")
    with pytest.raises(UserError, match="mem://web/2024/b.jsonl changed after .* or put the old file back"):
        run(tmp_path / "out", "mem://web/2024/")


def test_texts_below_metadata_are_not_shards(bucket: dict[str, bytes], tmp_path: Path) -> None:
    names = ["a.txt", "set/metadata.csv", "set/README.md", "set/train/1.txt", "sets/b.txt"]
    bucket |= {f"mem://web/{name}": b"" for name in names}
    found = [(f.url, f.kind) for f in resolve(["mem://web/"], "auto", tmp_path)]
    assert found == [
        ("mem://web/a.txt", "text"),
        ("mem://web/set/metadata.csv", "folder"),
        ("mem://web/sets/b.txt", "text"),
    ]


def test_urls_give_the_fingerprint_of_files(bucket: dict[str, bytes], tmp_path: Path) -> None:
    bucket["mem://web/x/a.jsonl"] = jsonl("one", "two")
    (tmp_path / "a.jsonl").write_bytes(jsonl("one", "two"))
    made = [
        run(tmp_path / str(number), where)
        for number, where in enumerate(
            ["mem://web/x/a.jsonl", "mem://web/*/*.jsonl", tmp_path / "a.jsonl", f"file://{tmp_path / 'a.jsonl'}"]
        )
    ]
    assert len({summary.fingerprint for summary in made}) == 1


def test_an_object_that_changes_while_it_is_read(bucket: dict[str, bytes], tmp_path: Path) -> None:
    bucket["mem://web/a.jsonl"] = jsonl(*["one"] * 2000)

    def change(what: str, done: int, total: int) -> None:
        bucket["mem://web/a.jsonl"] = jsonl("other")

    config = PrepareConfig(inputs=["mem://web/a.jsonl"], out=str(tmp_path / "out"), count_tokens=False)
    with pytest.raises(UserError, match="mem://web/a.jsonl changed while it was being read"):
        prepare(config, change)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("mem://web/c.jsonl", "no input 'mem://web/c.jsonl': there is no .*; end a prefix with /"),
        ("mem://web/none/", "no input 'mem://web/none/': nothing there$"),
        ("mem://web/pictures/", r"no input 'mem://web/pictures/': nothing there \(it has: .png\)"),
        ("gopher://web/a.jsonl", "unknown store 'gopher'"),
    ],
)
def test_urls_without_anything_to_read(bucket: dict[str, bytes], tmp_path: Path, where: str, message: str) -> None:
    bucket["mem://web/pictures/a.png"] = b""
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", where)


def test_an_unreadable_object_is_no_fault_of_the_folder(
    bucket: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from millrace.data import units

    bucket["mem://web/a.jsonl"] = jsonl("one")

    def fail(blob: Blob) -> str:
        raise StoreError(f"{blob.url} does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(units, "sha256_of", fail)
        with pytest.raises(UserError, match="^mem://web/a.jsonl does not answer; run the same command again"):
            run(tmp_path / "out", "mem://web/a.jsonl")
    run(tmp_path / "out", "mem://web/a.jsonl")


@pytest.mark.parametrize(
    ("text", "name", "where"),
    [
        ("books/", "books", "books/"),
        ("a/papers.parquet", "papers", "a/papers.parquet"),
        ("a/papers.v2.jsonl.gz", "papers.v2", "a/papers.v2.jsonl.gz"),
        ("web/**/*.jsonl", "web", "web/**/*.jsonl"),
        ("w=a/b.parquet", "w", "a/b.parquet"),
        ("w=s3://b/c/*.tar", "w", "s3://b/c/*.tar"),
        ("s3://bucket/web/2024/", "2024", "s3://bucket/web/2024/"),
        ("s3://bucket/web-{000..9}*.tar", "bucket", "s3://bucket/web-{000..9}*.tar"),
        ("https://host/a/b.jsonl?sig=x=y", "b", "https://host/a/b.jsonl?sig=x=y"),
        ("s3://b/day=1/", "day=1", "s3://b/day=1/"),
        ("datasets:owner/name:config:train", "name", "datasets:owner/name:config:train"),
        ("v1.5", "v1.5", "v1.5"),
    ],
)
def test_inputs_have_names(text: str, name: str, where: str) -> None:
    assert name_inputs([text]) == {name: where}


def test_names_are_unique_and_paths_with_an_equals_sign_are_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "year=2024").mkdir()
    (tmp_path / "year=2024" / "a.jsonl").write_bytes(jsonl("one"))
    assert name_inputs(["year=2024", "x=year=2024"]) == {"year=2024": "year=2024", "x": "year=2024"}
    assert name_inputs(["year=*/a.jsonl"]) == {"a": "year=*/a.jsonl"}
    with pytest.raises(UserError, match=r"two inputs are named 'a' \('p/a.jsonl' and 'q/a.tar'\); name one .* OTHER=q"):
        name_inputs(["p/a.jsonl", "q/a.tar"])
    summary = run(tmp_path / "out", "old=year=2024")
    assert [s["name"] for s in summary.train] == [s["name"] for s in Manifest.load(tmp_path / "out").sources] == ["old"]


def test_kinds_come_from_names(tmp_path: Path) -> None:
    there = {
        "a.jsonl": "jsonl", "b.NDJSON": "jsonl", "c.parquet": "parquet", "d.tar": "tar", "e.arrow": "arrow",
        "f.md": "text", "mds/shard.00000.mds": "mds", "mds/index.json": None, "g.bin": "megatron", "g.idx": None,
        "weights.bin": None, "pictures/metadata.csv": "folder", "pictures/metadata.jsonl": "folder",
        "pictures/1.png": None, "pictures/more/1.txt": None, "z/shard.00001.mds.zstd": "mds", ".hidden.txt": None,
    }  # fmt: skip
    for name in there:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = {str(Path(f.url).relative_to(tmp_path)): f.kind for f in resolve([str(tmp_path)], "auto", tmp_path / "out")}
    assert found == {name: kind for name, kind in there.items() if kind}
    for name in ("e.arrow", "c.parquet"):
        (named,) = resolve([str(tmp_path / name)], "jsonl", tmp_path / "out")
        assert named.kind == "jsonl"  # what was asked for, whatever the suffix
    in_glob = resolve([str(tmp_path / "mds" / "*")], "auto", tmp_path / "out")
    assert [Path(f.url).name for f in in_glob] == ["shard.00000.mds"]
    with pytest.raises(UserError, match="g.bin holds tokens; add --tokens tokens --tokenizer NAME"):
        run(tmp_path / "out", tmp_path / "g.bin")
