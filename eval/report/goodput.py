"""Where a run's time went: training that counts, and what was lost, by cause, from its ledger alone.

Effective training time is that of the steps whose updates are in the final weights, without what they waited for data
and without the first step's compilation; as a share of the time from the first start to the last record (that of
"The Llama 3 Herd of Models", https://arxiv.org/abs/2407.21783, section 3.3.4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from millrace.core.ledger import effective

Record = dict[str, Any]

CAUSES = {
    "training": "effective training",
    "data": "waiting for data",
    "save": "held up by saving",
    "eval": "evaluation",
    "start": "starting: imports, building, loading",
    "first": "first step of a start, beyond a typical step",
    "again": "steps computed again after a restart",
    "skipped": "steps not taken, or undone by a rollback",
    "down": "down: detecting, queueing",
    "other": "everything else",
}


@dataclass(frozen=True)
class Goodput:
    """Seconds by cause (`CAUSES`), from the first start to the last record."""

    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Effective training time as a share of all, 0 where there is none."""
        return self.seconds["training"] / self.total if self.total > 0 else 0.0


def goodput(records: Sequence[Record]) -> Goodput | None:
    """None for a ledger that holds no start."""
    parts = list(each_start(records))
    if not parts:
        return None
    seconds = dict.fromkeys(CAUSES, 0.0)
    kept, undone = {id(record) for record in effective(records, "step")}, _undone(records)
    for part in parts:
        _add_part(seconds, part, kept, undone)
    for before, after in zip(parts, parts[1:], strict=False):
        seconds["down"] += max(0.0, began(after[0]) - before[-1]["time"])
    wall = records[-1]["time"] - began(parts[0][0])
    seconds["other"] = max(0.0, wall - sum(seconds.values()))
    return Goodput(seconds)


def each_start(records: Sequence[Record]) -> Iterator[list[Record]]:
    """The records of each start, the `start` first."""
    borders = [n for n, record in enumerate(records) if record["event"] == "start"]
    for first, last in zip(borders, [*borders[1:], len(records)], strict=False):
        part = list(records[first:last])
        # The `resume` of the next start stands before that one's `start`.
        while part[-1]["event"] == "resume" and last < len(records):
            part.pop()
        yield part


def began(start: Record) -> float:
    """When the process of a start began."""
    return float(start["began"] if "began" in start else start["time"])


def _undone(records: Sequence[Record]) -> set[int]:
    """Steps that were not taken, and those whose updates a rollback threw away."""
    undone: set[int] = set()
    steps: list[Record] = []
    for record in records:
        if record["event"] == "step":
            steps.append(record)
        elif record["event"] in ("skip", "rollback"):
            since = record["to"] + 1 if record["event"] == "rollback" else record["step"]
            undone |= {id(step) for step in steps if since <= step["step"] <= record["step"]}
    return undone


def _stall(checkpoint: Record) -> float:
    """Before there was a `stall`, a step waited for the whole of a save."""
    return float(checkpoint["stall"] if "stall" in checkpoint else checkpoint.get("seconds", 0.0))


def _add_part(seconds: dict[str, float], part: list[Record], kept: set[int], undone: set[int]) -> None:
    steps = [record for record in part if record["event"] == "step" and "seconds" in record]
    seconds["save"] += sum(_stall(r) for r in part if r["event"] == "checkpoint")
    seconds["eval"] += sum(r.get("seconds", 0.0) for r in part if r["event"] == "eval")
    first = steps[0]["time"] - steps[0]["seconds"] if steps else part[-1]["time"]
    seconds["start"] += max(0.0, first - began(part[0]))
    typical = median(step["seconds"] for step in steps[1:]) if len(steps) > 1 else 0.0
    for number, step in enumerate(steps):
        spent, waited = step["seconds"], min(step.get("data_wait", 0.0), step["seconds"])
        beyond = max(0.0, spent - waited - typical) if number == 0 and typical else 0.0
        cause = "again" if id(step) not in kept else "skipped" if id(step) in undone else "training"
        seconds["data"] += waited
        seconds["first"] += beyond
        seconds[cause] += spent - waited - beyond
