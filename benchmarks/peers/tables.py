"""Medians, quartiles and tables of what `data_peers.py` measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common import quartiles

Summary = Mapping[str, Mapping[str, Any]]
_RATES = ("samples_per_s", "samples_per_cpu_s", "first_from_start", "first_from_open", "peak_pss")
_QUALITY = ("entropy", "shards_per_batch", "label_chi2")


def summarise(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Quartiles of every figure over the rounds; the worst of the counts; why it is missing or failed."""
    for why in ("missing", "error"):
        if rounds and all(why in one for one in rounds):
            return {why: rounds[0][why]}
    good = [one for one in rounds if "missing" not in one and "error" not in one]
    out: dict[str, Any] = {"rounds": len(good), "failed": len(rounds) - len(good)}
    for key in (*_RATES, *_QUALITY):
        values = [one[key] for one in good if one.get(key) is not None]
        if values:
            out[key] = quartiles(values)
    if good and "epoch" in good[0]:
        out |= _of_order(good)
    if good and "killed_at" in good[0]:
        out |= {key: quartiles([one[key] for one in good]) for key in ("duplicates", "losses")}
        out |= {key: good[0][key] for key in ("stateless", "shm_left")} | {
            "survivors": max(o["survivors"] for o in good)
        }
    return out


def _of_order(good: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {f"epoch_{key}": max(one["epoch"][key] for one in good) for key in ("duplicates", "losses")}
    places: list[dict[str, Any]] = []
    for parts in zip(*(one["resumed"] for one in good), strict=True):
        worked = [part for part in parts if "error" not in part]
        if not worked:
            places.append({"error": parts[0]["error"]})
            continue
        times = [part["first_from_open"] for part in worked if part.get("first_from_open") is not None]
        places.append(
            {
                "at": worked[0]["at"],
                "seconds": quartiles(times) if times else None,
                "duplicates": max(part["duplicates"] for part in worked),
                "losses": max(part["losses"] for part in worked),
                "continued": all(part["continued"] for part in worked),
                "stateless": worked[0]["stateless"],
            }
        )
    return out | {"resumed": places}


def tables(summary: Summary) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of each measure that was run."""
    shown = {
        "speed": (
            "Speed: median (quartiles)",
            ["cell", "samples/s", "samples per CPU-s", "first batch, s", "after opening, s"],
            lambda s: [_spread(s, "samples_per_s"), _spread(s, "samples_per_cpu_s"), *map(_median(s), _RATES[2:4])],
        ),
        "memory": ("Peak PSS of the process tree", ["cell", "MiB"], lambda s: [_spread(s, "peak_pss", 2**-20)]),
        "order": (
            "An epoch, and resumed at 10, 50 and 90%; 1 is a true permutation",
            ["cell", "entropy", "shards", "labels χ²", "twice/never", "resume, s", "then twice/never", "same order"],
            _order_row,
        ),
        "kill": (
            "Killed in mid-epoch and resumed from the last state",
            ["cell", "twice", "never", "first batch, s", "survivors", "left in /dev/shm"],
            lambda s: [
                _spread(s, "duplicates"), _spread(s, "losses"), _median(s)("first_from_open"),
                str(s["survivors"]), str(len(s["shm_left"])) + (" (no state)" if s["stateless"] else ""),
            ],
        ),
    }  # fmt: skip
    for measure, (title, columns, row) in shown.items():
        rows = [[name.partition("/")[2], *_row(s, row, len(columns) - 1)] for name, s in _of(summary, measure)]
        if rows:
            yield title, columns, rows


def _of(summary: Summary, measure: str) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, s) for name, s in summary.items() if name.startswith(measure + "/")]


def _row(s: Mapping[str, Any], row: Any, width: int) -> list[str]:
    if "missing" in s or "error" in s or not s.get("rounds"):
        return ["missing" if "missing" in s else "failed", *[""] * (width - 1)]
    return list(row(s))


def _order_row(s: Mapping[str, Any]) -> list[str]:
    good = [p for p in s["resumed"] if "error" not in p]
    times = " / ".join(f"{p['seconds'][1]:.2f}" if p.get("seconds") else "no batch" for p in s["resumed"])
    counts = " ".join(f"{p['duplicates']}/{p['losses']}" if "error" not in p else "failed" for p in s["resumed"])
    state = (
        ""
        if not good
        else "no state"
        if any(p["stateless"] for p in good)
        else "yes"
        if all(p["continued"] for p in good)
        else "no"
    )
    quality = [f"{s[key][1]:.4f}" for key in _QUALITY]
    return [*quality, f"{s['epoch_duplicates']}/{s['epoch_losses']}", times, counts, state]


def _spread(s: Mapping[str, Any], key: str, factor: float = 1.0) -> str:
    if key not in s:
        return ""
    low, middle, high = (f"{value * factor:,.0f}" for value in s[key])
    return f"{middle} ({low} – {high})"


def _median(s: Mapping[str, Any]) -> Any:
    return lambda key: f"{s[key][1]:.2f}" if key in s else ""


def against_best_peer(summary: Summary) -> dict[str, dict[str, Any]]:
    """Per modality, on the local store: our best arm and the best peer's by samples per CPU-second."""
    best: dict[str, dict[str, Any]] = {}
    for name, s in _of(summary, "speed"):
        _, modality, store, workers, arm = name.split("/")
        if store == "local" and arm != "ceiling" and "samples_per_cpu_s" in s:
            side = "ours" if arm.startswith("ours") else "peer"
            rate = s["samples_per_cpu_s"][1]
            found = best.setdefault(modality, {})
            if rate > found.get(side, ("", 0.0))[1]:
                found[side] = (f"{arm} {workers}", rate)
    for found in best.values():
        if len(found) == 2:
            found["ratio"] = found["ours"][1] / found["peer"][1]
    return best


def ratios(result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the last table."""
    return [
        [modality, *_side(found, "ours"), *_side(found, "peer"), f"{found['ratio']:.2f}" if "ratio" in found else ""]
        for modality, found in result["best_peer"].items()
    ]


def _side(found: Mapping[str, Any], side: str) -> list[str]:
    return [found[side][0], f"{found[side][1]:,.0f}"] if side in found else ["missing", ""]
