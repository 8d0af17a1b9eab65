"""What an arm did with its time and with its samples, from its log and from what the supervisor saw."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from statistics import median
from typing import Any

from faulty.supervise import History
from millrace.core.ledger import effective

Record = dict[str, Any]


def merge(logs: Sequence[Sequence[Record]]) -> list[Record]:
    """One history of the logs of several ranks: a step holds the samples of all, and is bad where one rank's loss is.

    A step that not every rank has finished is left out: its update is in no weights that were saved.
    """
    first, *others = logs
    known = [{(r["start"], r["step"]): r for r in log if r["event"] == "step"} for log in others]
    merged = []
    for record in first:
        if record["event"] != "step":
            merged.append(record)
        elif all((record["start"], record["step"]) in log for log in known):
            parts = [record, *(log[record["start"], record["step"]] for log in known)]
            losses = [part["loss"] for part in parts]
            samples = [sample for part in parts for sample in part["samples"]]
            merged.append({**record, "samples": samples, "loss": sum(losses) / len(losses)})
    return merged


def skipped(records: Iterable[Record]) -> set[tuple[int, float]]:
    """(step, time) of the step records whose update was not taken (an event `skip` follows them)."""
    found, last = set(), None
    for record in records:
        if record["event"] == "step":
            last = record["step"], record["time"]
        elif record["event"] == "skip" and last is not None:
            found.add(last)
    return found


def streams(steps: Sequence[Record], reference: Sequence[Sequence[Hashable]]) -> tuple[int, int]:
    """(samples lost, samples repeated) in the effective stream, beside that of a run that is never interrupted."""
    seen = Counter(_key(sample) for step in steps for sample in step["samples"])
    wanted = Counter(_key(sample) for step in reference[: len(steps)] for sample in step)
    return (wanted - seen).total(), (seen - wanted).total()


def _key(sample: Any) -> Hashable:
    return tuple(sample) if isinstance(sample, list) else sample


def figures(records: Sequence[Record], history: History, reference: Sequence[Sequence[Hashable]]) -> dict[str, Any]:
    """The figures of one arm; `records` has the events `start` and `step`, and `reference` the samples of each step."""
    records = [record for record in records if record["time"] <= history.until]
    steps, computed = effective(records, "step"), [r for r in records if r["event"] == "step"]
    not_taken = skipped(records)
    finite = [s for s in steps if (s["step"], s["time"]) not in not_taken and math.isfinite(s["loss"])]
    lost, repeated = streams(steps, reference)
    done = history.faults
    restarts = history.starts[1:]
    good = sum(step["seconds"] for step in finite)
    return {
        "wall_seconds": history.seconds,
        "goodput": good / history.seconds,
        "seconds_lost_per_fault": (history.seconds - good) / max(len(done), 1),
        "faults": len(done),
        "restarts": len(restarts),
        "steps": len(steps),
        "steps_per_minute": 60 * len(finite) / history.seconds,
        "step_seconds": median(s["seconds"] for s in computed) if computed else 0.0,
        "recomputed_steps": len(computed) - len(steps),
        "samples_lost": lost,
        "samples_repeated": repeated,
        "samples_computed_again": sum(len(s["samples"]) for s in computed) - sum(len(s["samples"]) for s in steps),
        "steps_not_taken": sum((s["step"], s["time"]) in not_taken for s in steps),
        "steps_poisoned": poisoned(steps),
        "interventions": len(history.interventions),
        "restarts_from_zero": sum(s.resumed == 0 and s.newest is not None for s in restarts),
        "damaged_loaded": sum(s.damaged and s.resumed == s.newest and s.first is not None for s in restarts),
        "hangs_ended_by_deadline": sum(s.hung for s in history.starts),
        "orphans": sum(s.orphans for s in history.starts),
        "ended_by_itself": history.over,
        "recovery_seconds": recovery(done),
        "final_loss": median([s["loss"] for s in steps[-20:]]) if steps else math.nan,
    }


def poisoned(steps: Sequence[Record]) -> int:
    """Steps whose loss is not finite, and that of the step before was not either: it got into the weights."""
    bad = [not math.isfinite(step["loss"]) for step in steps]
    return sum(now and before for before, now in zip(bad, bad[1:], strict=False))


def recovery(faults: Iterable[Record]) -> dict[str, float]:
    """Median seconds from a fault to the next step, by kind."""
    found: dict[str, list[float]] = {}
    for fault in faults:
        if "recovered" in fault:
            found.setdefault(fault["kind"], []).append(fault["recovered"] - fault["time"])
    return {kind: median(seconds) for kind, seconds in sorted(found.items())}
