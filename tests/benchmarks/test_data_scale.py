"""benchmarks/data_scale.py at a small size: what it measures is there, and all plans are one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.house.typing_tree import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other as siblings

import common
import data_scale

from millrace.data.manifest import Manifest

TOKENS = 100_000_000  # three steps


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("scale")
    return folder, data_scale.measure(folder, TOKENS, node=2)


def test_the_index_is_that_of_the_manifest(measured: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, found = measured
    manifest = Manifest.load(folder)
    entries = manifest.entries(np.arange(manifest.samples))
    assert manifest.tokens == entries.tokens.sum() == found["manifest"]["tokens"] >= TOKENS
    assert abs(entries.tokens.mean() / 1000 - 1) < 0.02
    assert [source["name"] for source in manifest.sources] == ["web", "code", "papers"]
    shares = np.array([source["documents"] for source in manifest.sources]) / manifest.samples
    assert np.allclose(shares, [0.6, 0.3, 0.1], atol=0.1)  # whole shards


def test_all_plan_the_same_order(measured: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    found = {name: one for name, one in measured[1].items() if name not in ("manifest", "whole")}
    unknown = [name for name, one in found.items() if one["same_order"] is None]
    assert unknown == ["resumed at 90%", "resumed at 100%"]  # both behind the last of three steps
    assert all(one["same_order"] is not False for one in found.values())
    assert [one["first_step"] for name, one in found.items() if name.startswith("resumed")] == [0, 1, 2, 3, 3]


def test_another_order_would_be_seen() -> None:
    found = {
        "whole": {"steps": ["a", "b", "c"]},
        "same": {"steps": ["b", "c", "d"], "first_step": 1},
        "other": {"steps": ["b", "x"], "first_step": 1},
    }
    data_scale._compare(found)
    assert (found["same"]["same_order"], found["other"]["same_order"]) == (True, False)


def test_the_report_is_saved(
    measured: tuple[Path, dict[str, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    data_scale._report(measured[1], {"tokens": TOKENS})
    (path,) = tmp_path.iterdir()
    whole = json.loads(path.read_text())["measurements"]["whole"]
    assert whole["tokens"] >= TOKENS and whole["cpu"] > 0
    assert 0 < whole["memory"]["anonymous"] < 500e6 and whole["state_bytes"] < 1000
