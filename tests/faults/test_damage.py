"""One bit that flips in a checkpoint on the disk: found before anything is loaded, and the one before it is used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from millrace.engine.checkpoint import read as reading
from millrace.engine.checkpoint.read import Checkpoint, open_newest, verdict
from tests.faults.saves import save

FILES = ("MANIFEST.json", "config.toml", "fixed.safetensors", "model/config.json", "rank-00000.json",
         "rank-00000.safetensors", "rank-00001.json", "rank-00001.safetensors", "trainer.json")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With checkpoints of the steps 1 and 2."""
    path = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        save(path, step)
    return path


def flipped(path: Path) -> Iterator[tuple[int, int]]:
    """The file with each of its bits turned over in turn: (byte, bit)."""
    whole = path.read_bytes()
    try:
        for byte in range(len(whole)):
            for bit in range(8):
                path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << bit]) + whole[byte + 1 :])
                yield byte, bit
    finally:
        path.write_bytes(whole)


def test_these_are_all_files(folder: Path) -> None:
    newest = folder / "step-00000002"
    assert sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file()) == sorted(FILES)
    assert not verdict(newest)


@pytest.mark.parametrize("name", FILES)
def test_every_bit_of_every_file(folder: Path, name: str) -> None:
    """Header and body; in the manifest a blank may change, which says the same."""
    newest = folder / "step-00000002"
    meant = json.loads((newest / "MANIFEST.json").read_text())
    seen = 0
    for byte, bit in flipped(newest / name):
        seen += 1
        why = verdict(newest)
        if name != "MANIFEST.json":
            assert why == f"{name} was altered: its SHA-256 differs from the manifest's", (byte, bit)
        elif not why:
            assert json.loads((newest / name).read_text()) == meant, (byte, bit)
    assert seen == 8 * (newest / name).stat().st_size > 0


@pytest.mark.parametrize("name", FILES)
def test_the_one_before_is_used_and_it_is_said(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    turned = flipped(folder / "step-00000002" / name)
    for _ in range(9):  # a bit of the second byte
        next(turned)
    found, rejected = open_newest(folder)
    turned.close()
    assert found is not None and found.step == 1
    (entry,) = rejected
    assert entry["path"].endswith("step-00000002") and name in entry["why"]
    said = " ".join(capsys.readouterr().err.split())
    assert "step-00000002 is not used" in said and name in said


def test_without_the_hashes_it_would_not_be_found(folder: Path) -> None:
    """What the tests above are worth: they fail when a hash is not looked at."""
    with mock.patch.object(reading, "file_sha256", lambda path: hashes[path.name]):
        hashes = {Path(n).name: e["sha256"] for n, e in Checkpoint(folder / "step-00000002").manifest["files"].items()}
        with pytest.raises(AssertionError):
            test_every_bit_of_every_file(folder, "rank-00001.safetensors")
    with mock.patch.object(reading, "manifest_sha256", lambda manifest: meant):
        meant = json.loads((folder / "step-00000002/MANIFEST.json").read_text())["sha256"]
        with pytest.raises(AssertionError):
            test_every_bit_of_every_file(folder, "MANIFEST.json")
