"""The report's figures: the sum of all units'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from millrace.data.curate.config import CurateConfig


def make_report(config: CurateConfig, work: Path) -> dict[str, Any]:
    """Counts and samples per source, clusters, evaluation files; from what the passes left in `work`."""
    units = [json.loads(path.read_text()) for path in sorted((work / "stats").glob("*.json"))]
    sources = [
        _source(name, [unit for unit in units if unit["source"] == number], config.samples)
        for number, name in enumerate(config.inputs)
    ]
    report: dict[str, Any] = {"total": _total(sources), "sources": sources}
    for step in ("exact", "near"):
        if (work / f"{step}.json").exists():
            report[step] = json.loads((work / f"{step}.json").read_text())
    if config.near:
        from millrace.data.curate.near import found_probability

        report["near"]["found"] = {f"{s / 20:.2f}": round(found_probability(s / 20), 4) for s in range(8, 20)}
    if config.eval:
        report["evaluation"] = _evaluation(work)
    return report


def _source(name: str, units: list[dict[str, Any]], samples: int) -> dict[str, Any]:
    rules: dict[tuple[str, str, bool], np.ndarray] = {}
    shown: dict[tuple[str, str, bool], list[tuple[int, dict[str, Any]]]] = {}
    for unit in units:
        for step, rule, stays, *counts in unit["rules"]:
            rules[step, rule, stays] = rules.get((step, rule, stays), 0) + np.array(counts)
        for step, rule, stays, order, sample in unit["samples"]:
            shown.setdefault((step, rule, stays), []).append((order, sample))
    return {
        "name": name,
        **{part: _pair(np.sum([[0, 0], *(unit[part] for unit in units)], axis=0)) for part in ("in", "kept")},
        "rules": [
            {
                "step": key[0],
                "rule": key[1],
                "kept": key[2],
                **_pair(rules[key]),
                "samples": [sample for _, sample in sorted(shown.get(key, []), key=lambda s: s[0])[:samples]],
            }
            for key in sorted(rules)
        ],
    }


def _pair(counts: Any) -> dict[str, int]:
    return {"documents": int(counts[0]), "bytes": int(counts[1])}


def _total(sources: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {
        part: _pair(np.sum([[s[part]["documents"], s[part]["bytes"]] for s in sources], axis=0))
        for part in ("in", "kept")
    }
    removed: dict[str, np.ndarray] = {}
    for rule in (rule for source in sources for rule in source["rules"] if not rule["kept"]):
        removed[rule["step"]] = removed.get(rule["step"], 0) + np.array([rule["documents"], rule["bytes"]])
    return total | {"removed": {step: _pair(counts) for step, counts in removed.items()}}


def _evaluation(work: Path) -> list[dict[str, Any]]:
    """Per file: its lines, those long enough to be found, those found, and in how many documents of 13-grams."""
    files = json.loads((work / "evaluation" / "files.json").read_text())
    found = [np.load(path) for path in sorted((work / "lines").glob("*.npy"))]
    lines = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
    made = []
    for file in files:
        inside = (lines >= file["first"]) & (lines < file["first"] + file["lines"])
        made.append({name: file[name] for name in ("path", "lines", "checkable")} | {"found": int(inside.sum())})
    return made
