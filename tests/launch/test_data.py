"""`millrace data …` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace.data.index import to_entries
from millrace.launch.cli import main
from millrace.launch.data import SUBCOMMANDS


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "web"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"document {number}: the mill turns and turns. " * 5)
    return folder


def costs(folder: str) -> list[int]:
    (path,) = Path(folder, "index").iterdir()
    with pa.memory_map(str(path)) as file:
        return to_entries(pa.ipc.open_file(file).read_all()).tokens.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", sorted(SUBCOMMANDS))
def test_every_subcommand_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", name, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"usage: millrace data {name}" in said and f"example: millrace data {name} " in said
    assert main(["data"]) == 0
    listed = capsys.readouterr().out
    assert SUBCOMMANDS[name][1] in listed and max(map(len, listed.splitlines())) <= 100


def test_index_counts_with_a_tokenizer_that_is_named_and_trains_none(
    web: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "index", "web", "--out", "plain"]) == 0
    assert capsys.readouterr().out == f"{web.parent / 'plain'}\n"
    assert costs("plain") == [0] * 4 and not Path("plain/tokenizer").exists()
    assert main(["prepare", "web", "--out", "prepared", "--vocab-size", "300"]) == 0
    assert main(["data", "index", "web", "--out", "counted", "--tokenizer", "prepared/tokenizer"]) == 0
    assert costs("counted") == costs("prepared") and min(costs("counted")) > 1
    prints = [json.loads(Path(name, "manifest.json").read_text())["fingerprint"] for name in ("counted", "prepared")]
    assert prints[0] == prints[1]


def test_files_that_were_added_are_appended(web: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["data", "index", "pages=web", "--out", "out"]
    assert main(call) == 0 and main(call) == 0
    assert "was already prepared" in " ".join(capsys.readouterr().err.split())
    (web / "00.txt").write_text("new")
    assert main(call) == 0
    assert "has grown by 1 file" in " ".join(capsys.readouterr().err.split())
    (source,) = json.loads(Path("out/manifest.json").read_text())["sources"]
    assert (source["name"], source["documents"]) == ("pages", 5)


def test_rules_of_media_are_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for size in (10, 100):
        Image.new("L", (size, size)).save(f"{size}.png")
    images = [Path(f"{size}.png").read_bytes() for size in (10, 100)]
    pq.write_table(pa.table({"jpg": images}), "images.parquet")
    rules = ["--image-patch", "10", "--image-most", "81", "--audio-hop-ms", "5"]
    assert main(["data", "index", "images.parquet", "--out", "out", "--image", "jpg", *rules]) == 0
    assert costs("out") == [2, 82]
    assert json.loads(Path("out/manifest.json").read_text())["costs"] == {"image": {"patch": 10, "most": 81}}


def test_verify_says_what_differs_and_fails(web: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "index", "web", "--out", "out"]) == 0
    capsys.readouterr()
    assert main(["data", "verify", "out"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("out: 4 shards (") and said.out.endswith("and 1 index files are what was indexed\n")
    (web / "2.txt").write_text("altered")
    (web / "3.txt").unlink()
    assert main(["data", "verify", "out"]) == 1
    said = capsys.readouterr()
    assert "2 of 4 shards" in said.err and "2.txt" in said.err and "3.txt" in said.err and "1.txt" not in said.err
    assert "short: it has 7 bytes" in " ".join(said.err.split()) and said.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verfy", "out"], "unknown sub-command 'data verfy'; did you mean 'verify'?"),
        (["verify", "nowhere"], "no manifest in nowhere"),
        (["index", "nowhere", "--out", "out"], "no input 'nowhere'"),
        (["index", "web", "--out", "out", "--tokens", "ids"], "needs the tokenizer that they were made with"),
        (["index", "web", "--out", "out", "--image", "i", "--image-patch", "0"], "costs.image.patch = 0 must be"),
    ],
)
def test_mistakes(web: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *arguments]) == 1
    said = capsys.readouterr()
    assert message in said.err and said.out == ""
