"""Which curves a report shows, and from which records of the ledger they are drawn."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

from millrace.eval.report.curves import Chart, Series, smooth
from millrace.eval.report.history import History, Record

# The first steps of a run are far above all others; their share of the curve may run off the top.
_WARM = 0.04


def charts(history: History) -> list[Chart]:
    """The charts whose records exist, in the order in which they are shown."""
    steps = history.steps
    drawn = [
        _quality(history, "loss", "Loss, nats per token"),
        _quality(history, "bpb", "Bits per byte"),
        _plain(history, steps, "tokens_per_s", "Throughput, tokens per second"),
        _plain(history, _percent(steps, "mfu"), "mfu", "Model-FLOPs utilisation", "percent"),
        _plain(history, _waits(steps), "wait", "Share of time waiting for data", "percent"),
        _plain(history, steps, "lr", "Learning rate"),
        _plain(history, steps, "grad_norm", "Gradient norm", "log"),
        _layers(history, "grad", "Gradient norm by layer"),
        _layers(history, "weight", "Weight norm by layer"),
        _plain(history, history.norms, "max_logit", "Largest logit"),
    ]
    return [chart for chart in drawn if chart is not None]


def _quality(history: History, key: str, title: str) -> Chart | None:
    steps, evals = _with(history.steps, key), _with(history.evals, key)
    series = []
    if steps:
        x, y = _column(steps, "step"), _column(steps, key)
        mean = smooth(y)
        if len(y) > 50:
            series.append(Series("each step", x, y, "faint"))
        series.append(Series("training", x, mean if len(y) > 50 else y))
    if evals:
        series.append(Series("held-out", _column(evals, "step"), _column(evals, key), "second", dots=len(evals) <= 40))
    if not series:
        return None
    counted = _with(history.steps, "tokens_total")
    tokens = (_column(counted, "step"), _column(counted, "tokens_total")) if len(counted) > 1 else None
    return Chart(title, series, history.restarts, tokens, skip=_WARM)


def _plain(history: History, records: Sequence[Record], key: str, title: str, scale: str = "linear") -> Chart | None:
    found = _with(records, key)
    if not found:
        return None
    x, y = _column(found, "step"), _column(found, key)
    series = [Series(title, x, y)]
    if len(y) > 50 and key not in ("lr", "max_logit"):
        series = [Series("each step", x, y, "faint"), Series("average", x, smooth(y))]
    # The first step warms caches up and compiles: it says nothing about the speed of the run.
    return Chart(title, series, history.restarts, scale=scale, skip=_WARM if key in ("tokens_per_s", "mfu") else 0.0)


def _layers(history: History, key: str, title: str) -> Chart | None:
    """One line for each layer, coloured from blue (first) to orange (last)."""
    names = list(dict.fromkeys(name for record in history.norms for name in record.get(key) or {}))
    if not names:
        return None
    series = []
    for number, name in enumerate(names):
        found = [record for record in history.norms if name in (record.get(key) or {})]
        colour = _hue(number / max(1, len(names) - 1))
        series.append(Series(name, _column(found, "step"), [float(r[key][name]) for r in found], colour))
    return Chart(title, series, history.restarts, scale="log")


def _hue(share: float) -> str:
    """A colour of middle lightness, legible on white and on black, from blue through magenta to orange."""
    red, green, blue = colorsys.hls_to_rgb((0.60 + 0.49 * share) % 1.0, 0.56, 0.62)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def _with(records: Sequence[Record], key: str) -> list[Record]:
    """Records with a finite or broken number at `key`, if any of them is finite."""
    found = [record for record in records if record.get(key) is not None]
    return found if any(math.isfinite(record[key]) for record in found) else []


def _column(records: Sequence[Record], key: str) -> list[float]:
    return [float(record[key]) for record in records]


def _percent(records: Sequence[Record], key: str) -> list[Record]:
    return [{"step": r["step"], key: 100 * r[key]} for r in records if r.get(key) is not None]


def _waits(steps: Sequence[Record]) -> list[Record]:
    return [
        {"step": s["step"], "wait": 100 * s["data_wait"] / s["seconds"]}
        for s in steps
        if s.get("seconds") and s.get("data_wait") is not None
    ]
