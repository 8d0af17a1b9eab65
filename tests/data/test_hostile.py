"""Hostile data, as `millrace data index` and `prepare` meet it: refused by default, and nothing is ever unpickled."""

from __future__ import annotations

import ast
import gzip
import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from millrace.core.errors import UserError
from millrace.data.manifest import Manifest
from millrace.data.prepare import PrepareConfig, Summary, prepare
from millrace.data.sources import parquet
from tests.house.typing_tree import modules


def index(out: Path, source: object, **options: Any) -> Summary:
    return prepare(PrepareConfig(inputs=[str(source)], out=str(out), count_tokens=False, **options))


def tar(path: Path, hostile: tarfile.TarInfo, raw: bytes = b"", end: str = "txt", honest: bytes = b"x") -> Path:
    """A hostile member between two honest samples."""
    with tarfile.open(path, "w") as archive:
        for member, content in (
            (tarfile.TarInfo(f"a.{end}"), honest),
            (hostile, raw),
            (tarfile.TarInfo(f"z.{end}"), honest),
        ):
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def numpy_file(array: np.ndarray) -> bytes:
    raw = io.BytesIO()
    np.save(raw, array, allow_pickle=True)
    return raw.getvalue()


class Mark:
    """Unpickled, it leaves a file."""

    path = ""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (self.path, "w")


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[bytes]:
    """A pickle that tells whether it was loaded."""
    monkeypatch.setattr(Mark, "path", str(tmp_path / "unpickled"))
    yield pickle.dumps(Mark())
    assert not (tmp_path / "unpickled").exists()


MEMBERS = {
    "absolute": ("/etc/cron.d/b.txt", tarfile.REGTYPE, "", "is named by an absolute path"),
    "parent": ("../../b.txt", tarfile.REGTYPE, "", r"is named by a path with '\.\.'"),
    "hard link": ("b.txt", tarfile.LNKTYPE, "/etc/passwd", "is a hard link"),
    "symbolic link": ("b.txt", tarfile.SYMTYPE, "/etc/passwd", "is a symbolic link"),
    "character device": ("b.txt", tarfile.CHRTYPE, "", "is a character device"),
    "block device": ("b.txt", tarfile.BLKTYPE, "", "is a block device"),
    "FIFO": ("b.txt", tarfile.FIFOTYPE, "", "is a FIFO"),
}


@pytest.mark.parametrize(("name", "kind", "link", "why"), MEMBERS.values(), ids=list(MEMBERS))
def test_members_that_lead_elsewhere(name: str, kind: bytes, link: str, why: str, corpora: Any, tmp_path: Path) -> None:
    hostile = tarfile.TarInfo(name)
    hostile.type, hostile.linkname = kind, link
    path = tar(tmp_path / "x.tar", hostile)
    with pytest.raises(UserError, match=f"{path}, document 1: .*{why}.*; mend the file, or leave .* --on-bad skip"):
        index(tmp_path / "stop", path, text="txt")
    assert len(index(tmp_path / "skip", path, text="txt", on_bad="skip").skipped) == 1
    assert [sample["text"] for sample in corpora.read_samples(tmp_path / "skip")] == ["x", "x"]


@pytest.mark.parametrize("end", ["pyd", "pkl", "pickle", "pth", "pt"])
def test_pickled_members(end: str, mark: bytes, corpora: Any, tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", tarfile.TarInfo(f"b.{end}"), mark)
    with pytest.raises(UserError, match="is a pickle, which runs code when it is read"):
        index(tmp_path / "stop", path, text="txt")
    with pytest.raises(UserError, match=f"members '.{end}' are pickles"):
        index(tmp_path / "asked", path, text=end)
    index(tmp_path / "skip", path, text="txt", on_bad="skip")
    assert [sample["text"] for sample in corpora.read_samples(tmp_path / "skip")] == ["x", "x"]


def test_pickles_in_arrays_and_columns(mark: bytes, corpora: Any, tmp_path: Path) -> None:
    tokenizer = corpora.prepare_documents(tmp_path / "other", corpora.make_documents(20)) / "tokenizer"
    hostile, honest = numpy_file(np.array([Mark()], object)), numpy_file(np.arange(3))
    path = tar(tmp_path / "x.tar", tarfile.TarInfo("b.npy"), hostile, "npy", honest)
    tokens = {"tokens": "npy", "tokenizer": str(tokenizer)}
    with pytest.raises(UserError, match="x.tar, document 1: .*npy"):
        prepare(PrepareConfig(inputs=[str(path)], out=str(tmp_path / "npy"), on_bad="stop", **tokens))
    config = json.dumps(
        {"format": "mds", "version": 2, "column_names": ["text"], "column_encodings": ["pkl"], "column_sizes": [None]}
    ).encode()
    start = 12 + len(config)
    head = struct.pack("<III", 1, start, start + 4 + len(mark)) + config
    (tmp_path / "x.mds").write_bytes(head + struct.pack("<I", len(mark)) + mark)
    with pytest.raises(UserError, match="x.mds: the column 'text' is pickled, which runs code when it is read"):
        index(tmp_path / "mds", tmp_path / "x.mds")


@pytest.mark.parametrize("end", ["gz", "zst"])
def test_compressed_bombs(end: str, tmp_path: Path) -> None:
    raw = bytes(100 * 2**20)
    path = tmp_path / f"x.jsonl.{end}"
    path.write_bytes(gzip.compress(raw) if end == "gz" else zstandard.compress(raw))
    with pytest.raises(UserError, match=f"{path} is larger than .* when decompressed: refused"):
        index(tmp_path / "out", path)


def coded(path: Path, length: int, rows: int) -> Path:
    """One long value that a dictionary holds once, and all rows name; the footer's sizes are those of the pages."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * length]))
    options = {"compression": "zstd", "write_statistics": False, "store_schema": False}
    pq.write_table(pa.table({"text": column}), path, dictionary_pagesize_limit=2**30, **options)
    return path


def test_a_parquet_dictionary_of_a_long_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 GB, from a file of a few KiB."""
    path = coded(tmp_path / "x.parquet", 4 * 2**20, 100_000)
    assert path.stat().st_size < 10_000 and pq.ParquetFile(path).metadata.row_group(0).total_byte_size < 5 * 2**20
    monkeypatch.setattr(parquet, "_MAX_GROUP", 2**28)
    monkeypatch.setattr(parquet, "_MAX_BATCH", 2**25)
    with pytest.raises(UserError, match=r"x.parquet: row group 0 has \d{9} bytes, more than 268435456; write smaller"):
        index(tmp_path / "out", path)


def test_parquet_pages_larger_than_the_footer_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_MAX_GROUP", 2**26)
    monkeypatch.setattr(parquet, "_check_size", lambda *_: None)  # as if it claimed to be small
    table = pa.table({"text": ["x" * 2**21] * 40, "other": ["y"] * 40})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(UserError, match=r"row group 0 has 83\d{6} bytes, more than 67108864"):
        index(tmp_path / "out", tmp_path / "x.parquet")
    assert index(tmp_path / "small", tmp_path / "x.parquet", text="other").train[0]["documents"] == 40


def test_a_parquet_list_of_a_run(tmp_path: Path, corpora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a billion equal tokens, from a file of a few KiB; refused by their number."""
    tokenizer = corpora.prepare_documents(tmp_path / "other", corpora.make_documents(20)) / "tokenizer"
    monkeypatch.setattr(parquet, "_MAX_GROUP", 2**24)
    values = pa.array(np.zeros(4 * 2**20, np.uint16))
    table = pa.table({"tokens": pa.ListArray.from_arrays([0, len(values)], values)})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd")
    assert (tmp_path / "x.parquet").stat().st_size < 10_000
    with pytest.raises(UserError, match=r"row group 0 has 335\d{5} bytes, more than 16777216"):
        config = PrepareConfig(
            inputs=[f"{tmp_path}/x.parquet"], out=str(tmp_path / "out"), tokens="tokens", tokenizer=str(tokenizer)
        )
        prepare(config)


def test_an_image_above_the_limit_of_pixels(tmp_path: Path, corpora: Any) -> None:
    hostile, honest = corpora.make_png(9000, 9000), corpora.make_png(9, 9)
    assert len(hostile) < 100_000
    path = tar(tmp_path / "x.tar", tarfile.TarInfo("b.png"), hostile, "png", honest)
    with pytest.raises(UserError, match="document 1: the image cannot be read: 9000 x 9000 pixels, more than 67108864"):
        index(tmp_path / "out", path, image="png")


def test_a_line_of_a_gigabyte(tmp_path: Path, corpora: Any) -> None:
    with open(tmp_path / "x.jsonl", "wb") as file:
        file.write(b'{"text": "first"}\n{"text": "')
        file.seek(2**30, 1)
        file.write(b'"}\n{"text": "last"}\n')
    with pytest.raises(UserError, match=f"document 1: the line at byte 18 has {2**30 + 13} bytes, more than"):
        index(tmp_path / "out", tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "2852039166", "0xa9fea9fe"]
)
def test_a_url_of_a_link_local_address(host: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no input 'http://.*is refused: .*link-local address"):
        index(tmp_path / "out", f"http://{host}/latest/meta-data/x.jsonl")


def test_an_endpoint_at_a_link_local_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://169.254.169.254")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL is refused: .*link-local address"):
        index(tmp_path / "out", "s3://bucket/x.jsonl")


def test_a_manifest_whose_shard_is_moved_to_a_link_local_address(tmp_path: Path, corpora: Any) -> None:
    """The loader refuses it too: where shards lie is no part of the fingerprint."""
    folder = corpora.prepare_documents(tmp_path, ["one", "two"])
    record = json.loads((folder / "manifest.json").read_text())
    record["shards"][0]["url"] = "http://169.254.169.254/documents.jsonl"
    (folder / "manifest.json").write_text(json.dumps(record))
    assert Manifest.load(folder).samples == 2
    with pytest.raises(UserError, match="is refused: .*link-local address"):
        corpora.read_samples(folder)


FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
# Between our own processes, and the import of weights that asks for --trust-pickle.
OURS = {"millrace.data.curate.pool", "millrace.engine.distributed", "millrace.launch.import_weights"}


def unpickling(tree: ast.AST) -> Iterator[str]:
    """Imports and calls that unpickle, or may."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (name for name in names if name.partition(".")[0] in FORBIDDEN | {"multiprocessing"})
        if not isinstance(node, ast.Call):
            continue
        called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called == "torch.load" and keywords.get("weights_only") != "True":
            yield called
        if keywords.get("allow_pickle", "False") != "False" or called.endswith(("_object", "_object_list")):
            yield called


def test_no_module_unpickles() -> None:
    found = {name: list(unpickling(ast.parse(path.read_text()))) for name, path in modules().items()}
    assert {name for name, calls in found.items() if calls} == OURS, found
    assert len(found) > 100


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from pickle import loads", "torch.load(f)", "torch.load(f, weights_only=False)",
     "np.load(f, allow_pickle=True)", "import multiprocessing as m", "from multiprocessing.shared_memory import X"],
)  # fmt: skip
def test_the_scan_finds(line: str) -> None:
    assert list(unpickling(ast.parse(line)))
