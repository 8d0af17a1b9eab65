from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from millrace.core.errors import UserError
from millrace.data.sources.base import MAX_SAMPLE_BYTES, BadSample
from millrace.data.sources.beside import replace_suffix, url_beside
from tests.data.sources.check import agree, contents, cut_everywhere, make, scan

ROLES = {"image": "file_name", "text": "caption"}
FORMS = ["metadata.jsonl", "metadata.csv"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["file_name", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    return path


def fill(folder: Path, count: int, form: str) -> tuple[Path, list[dict[str, Any]]]:
    (folder / "sub").mkdir()
    rows = [{"id": i, "file_name": f"sub/{i}.x", "caption": f'é "{i}",\n{i}'} for i in range(count)]
    for i, row in enumerate(rows):
        (folder / row["file_name"]).write_bytes(bytes([i]) * i)
    return write(folder / form, rows), [{"image": bytes([i]) * i, "text": r["caption"]} for i, r in enumerate(rows)]


def why(path: Path, columns: dict[str, str] = ROLES) -> list[str]:
    return [c.why if isinstance(c, BadSample) else "" for c in contents(scan("folder", columns, path))]


@pytest.mark.parametrize("form", FORMS)
def test_files_beside_their_metadata(tmp_path: Path, form: str) -> None:
    path, expected = fill(tmp_path, 12, form)
    agree("folder", ROLES, path, expected)
    agree("folder", {"audio": "file_name"}, path, [{"audio": row["image"]} for row in expected])


@pytest.mark.parametrize("form", FORMS)
def test_images_are_those_of_datasets(tmp_path: Path, form: str) -> None:
    for i in range(5):
        Image.new("RGB", (i + 1, 3), (i, 2 * i, 99)).save(tmp_path / f"{i}.png")
    path = write(tmp_path / form, [{"file_name": f"{i}.png", "caption": f"c{i}"} for i in range(5)])
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), cache_dir=str(tmp_path / ".c"), split="train")
    loaded = loaded.cast_column("image", datasets.Image(decode=False))
    expected = [
        {"image": (tmp_path / Path(r["image"]["path"]).name).read_bytes(), "text": r["caption"]} for r in loaded
    ]
    agree("folder", ROLES, path, expected)


def test_text_may_be_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é\n")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    rows = [{"text_file_name": name, "caption": "c"} for name in ("a.txt", "b.txt")]
    path = write(tmp_path / "metadata.jsonl", rows)
    good, bad = contents(scan("folder", {"text": "text_file_name"}, path))
    assert good == {"text": "é\n"} and "the file 'b.txt': not UTF-8 at byte 0" in bad.why


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/hostname", "is not relative to the folder"),
        ("~/x", "is not relative"),
        ("C:\\x", "is not relative"),
        ("\\\\server\\x", "is not relative"),
        ("https://127.0.0.1/x", "is not relative"),
        ("file:///etc/hostname", "is not relative"),
        ("../outside", "leads out of the folder by '..'"),
        ("sub/../../outside", "leads out of the folder by '..'"),
        ("sub\\..\\..\\outside", "leads out of the folder by '..'"),
        ("link", "is a link that leads out of the folder"),
        ("folder-link/outside", "is a link that leads out of the folder"),
        ("circle", "cannot be found"),
        ("missing", "the file 'missing' cannot be found: No such file"),
        ("fifo", "'fifo' is not a regular file"),
        ("sub", "'sub' is not a regular file"),
        ("a\tb", "has characters that cannot be printed"),
        ("", "is empty"),
    ],
)
def test_names_that_lead_elsewhere_are_bad_samples(tmp_path: Path, form: str, name: str, reason: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "outside").write_text("secret")
    path, expected = fill(folder, 1, form)
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "folder-link").symlink_to(tmp_path)
    (folder / "circle").symlink_to("circle")
    os.mkfifo(folder / "fifo")
    write(path, [{"file_name": name, "caption": "c"}, {"file_name": "sub/0.x", "caption": "d"}])
    first, second = why(path)
    assert reason in first and second == ""


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    path, expected = fill(tmp_path, 1, "metadata.jsonl")
    (tmp_path / "link").symlink_to("sub/0.x")
    write(path, [{"file_name": "link", "caption": expected[0]["text"]}])
    agree("folder", ROLES, path, expected)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        file.truncate(MAX_SAMPLE_BYTES + 1)
    path = write(tmp_path / "metadata.csv", [{"file_name": "a", "caption": "c"}])
    assert f"the file 'a' has {MAX_SAMPLE_BYTES + 1} bytes, more than {MAX_SAMPLE_BYTES}" in why(path)[0]


def test_columns_that_are_missing_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "metadata.csv", [{"file_name": "a", "captions": "c"}])
    with pytest.raises(UserError, match="metadata.csv has no column 'caption'; did you mean 'captions'"):
        scan("folder", ROLES, path)
    path = write(tmp_path / "metadata.jsonl", [{"file_name": 3, "captions": "c"}, {"captions": "c"}])
    assert ["file name is int" in why(path)[0], "has no field 'file_name' (it has: captions)" in why(path)[1]] == [
        True
    ] * 2
    (tmp_path / "metadata.csv").write_text("")
    with pytest.raises(UserError, match="metadata.csv is not a CSV file with a row of column names"):
        scan("folder", ROLES, tmp_path / "metadata.csv")
    with pytest.raises(UserError, match="a folder with a metadata file cannot hold 'tokens'"):
        make("folder", {"tokens": "ids"})


def test_rows_of_csv_that_do_not_fit_are_bad(tmp_path: Path) -> None:
    path = tmp_path / "metadata.csv"
    path.write_bytes(b'file_name,caption\r\na,b,c\r\n\r\n"x"y,c\r\n\xff,c\r\na,"never closed\n')
    whys = why(path)
    assert "has 3 values, there are 2 columns" in whys[0] and "is not CSV" in whys[1]
    assert "not UTF-8" in whys[2] and "is not CSV: unexpected end of data" in whys[3]


def test_metadata_cut_inside_a_row_is_noticed(tmp_path: Path) -> None:
    path, _ = fill(tmp_path, 3, "metadata.jsonl")
    ends = [sum(sample.place) for sample in scan("folder", ROLES, path)]
    # cut between two rows, or without the last line feed, it is a whole file: the manifest's size tells
    allowed = {0, *ends, *(end - 1 for end in ends)}
    assert set(cut_everywhere("folder", ROLES, path, range(path.stat().st_size))) <= allowed


def test_quotes_that_never_close_are_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "metadata.csv"
    path.write_bytes(b'file_name,caption\na,"' + (b"x" * 999 + b"\n") * 70_000)
    (only,) = why(path)
    assert f"has {70_000_003} bytes, more than {MAX_SAMPLE_BYTES}" in only


def test_urls_of_files_beside_a_shard() -> None:
    assert url_beside("/d/metadata.csv", "sub/a b.jpg") == "/d/sub/a b.jpg"
    assert url_beside("metadata.csv", "a.jpg") == "a.jpg"
    assert url_beside("s3://bucket/d/metadata.csv", "a?b.jpg") == "s3://bucket/d/a?b.jpg"
    assert url_beside("https://host/d/m.csv?key=1/2", "a b?.jpg") == "https://host/d/a%20b%3F.jpg?key=1/2"
    assert replace_suffix("https://host/d/m.v2.bin?k=1", ".idx") == "https://host/d/m.v2.idx?k=1"
    assert replace_suffix("/d.x/m.bin", ".idx") == "/d.x/m.idx"


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.binary(max_size=20), st.text(max_size=20)), min_size=1, max_size=8), st.sampled_from(FORMS)
)
def test_any_rows_come_back(found: list[tuple[bytes, str]], form: str) -> None:
    found = [(raw, text.encode("utf-8", "replace").decode()) for raw, text in found]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, (raw, _) in enumerate(found):
            (folder / f"{i}.jpg").write_bytes(raw)
        rows = [{"file_name": f"{i}.jpg", "caption": text} for i, (_, text) in enumerate(found)]
        path = write(folder / form, rows)
        expected = [{"image": raw, "text": text} for raw, text in found]
        if form.endswith("csv"):
            with io.StringIO(path.read_bytes().decode(), newline="") as file:
                expected = [
                    row | {"text": read["caption"]} for row, read in zip(expected, csv.DictReader(file), strict=True)
                ]
        agree("folder", ROLES, path, expected)
