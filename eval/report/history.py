"""What a report says about a run, computed from the records of its ledger."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from millrace.core.errors import CONTINUE, DONE, STOP
from millrace.core.ledger import consumed, effective
from millrace.core.units import fmt_count, fmt_seconds
from millrace.eval.report.goodput import Goodput, goodput
from millrace.eval.report.recovery import Recovery, recoveries

Record = dict[str, Any]
# A single step's loss is mostly noise: the reported one is the mean of the last steps.
_LAST = 20
# What went wrong and was dealt with: event → in words.
INCIDENTS = {
    "skip": "step not taken",
    "rollback": "back to a checkpoint",
    "replicas": "weights differ between ranks",
    "straggler": "slow rank",
    "hang": "hang",
    "quarantine": "sample left out",
    "upload": "checkpoint not in the object store",
}
_OUTCOMES = {
    DONE: ("finished", "good"),
    CONTINUE: ("paused, to be continued", "open"),
    STOP: ("stopped", "bad"),
}


@dataclass(frozen=True)
class History:
    """The history of a run as if it had never been interrupted, and beside it the interruptions."""

    started: float | None
    start: Record
    steps: list[Record]
    evals: list[Record]
    norms: list[Record]
    samples: list[Record]
    checkpoints: list[Record]
    recoveries: list[Recovery]
    restarts: list[int]
    recomputed: int
    end: Record | None
    wall_seconds: float
    incidents: list[Record]
    goodput: Goodput | None

    @classmethod
    def of(cls, records: Sequence[Record]) -> History:
        """Read the records of one ledger, in the order in which they were written."""
        used = consumed(records)
        starts = [number for number, record in enumerate(records) if record["event"] == "start"]
        last_start = records[starts[-1]] if starts else {}
        ends = [record for record in records[starts[-1] if starts else 0 :] if record["event"] == "end"]
        return cls(
            started=records[starts[0]]["time"] if starts else None,
            start=last_start,
            steps=used.steps,
            evals=effective(records, "eval"),
            norms=effective(records, "norms"),
            samples=effective(records, "sample"),
            checkpoints=[record for record in records if record["event"] == "checkpoint"],
            recoveries=recoveries(records),
            restarts=used.restarts,
            recomputed=used.recomputed,
            end=ends[-1] if ends else None,
            wall_seconds=_running_seconds(records, starts),
            incidents=[record for record in records if _is_incident(record)],
            goodput=goodput(records),
        )

    def outcome(self) -> tuple[str, str]:
        """(words, kind): how the run ended; the kind is "good", "open" or "bad"."""
        if self.end is None:
            return "running, or killed: no end recorded", "open"
        code = self.end.get("outcome")
        words, kind = _OUTCOMES.get(code, (f"ended with outcome {code}", "bad"))  # type: ignore[arg-type]
        why = self.end.get("why")
        return (f"{words}: {why}" if why else words), kind

    def summary(self) -> str:
        """One sentence: what was trained, on how much, for how long, and how good it is."""
        if not self.steps:
            return "No step has been recorded yet."
        parts = [f"{fmt_count(self.start['params'])} parameters, trained" if "params" in self.start else "Trained"]
        tokens = fmt_count(self.steps[-1].get("tokens_total", 0))
        parts.append(f"on {tokens} tokens in {fmt_seconds(self.wall_seconds)}")
        world = self.start.get("world")
        if world:
            stage = self.start.get("zero_stage")
            how = [f"ZeRO {stage}"] if stage is not None else []
            how += [str(self.start["precision"])] if "precision" in self.start else []
            parts.append(f"on {world} rank{'s' * (world != 1)}" + (f" ({', '.join(how)})" if how else ""))
        bpb = last(self.evals, "bpb")
        end = f": {bpb:.3f} bits per byte on held-out text." if bpb is not None else "."
        return " ".join(parts) + end

    def figures(self) -> list[tuple[str, str]]:
        """(name, value) of the key figures that the ledger allows, in the order in which they are shown."""
        seconds = sum(values(self.steps, "seconds"))
        losses = values(self.steps, "loss")
        best = min(values(self.evals, "bpb"), default=None)
        broken = sum(not math.isfinite(s["loss"]) for s in self.steps if "loss" in s)
        tail = losses[-_LAST:]
        found: list[tuple[str, str | None]] = [
            ("Parameters", show(self.start.get("params"), fmt_count)),
            ("Tokens", show(last(self.steps, "tokens_total"), fmt_count)),
            ("Steps", f"{self.steps[-1]['step']:,}" if self.steps else None),
            (f"Training loss, last {len(tail)} steps", f"{fmean(tail):.4f}" if tail else None),
            ("Held-out loss", show(last(self.evals, "loss"), "{:.4f}".format)),
            ("Held-out bits per byte", show(last(self.evals, "bpb"), "{:.4f}".format)),
            ("Best held-out bits per byte", show(best, "{:.4f}".format)),
            ("Tokens per second, median", show(middle(self.steps, "tokens_per_s"), fmt_count)),
            ("Model-FLOPs utilisation, median", show(middle(self.steps, "mfu"), "{:.1%}".format)),
            (
                "Time spent waiting for data",
                f"{sum(values(self.steps, 'data_wait')) / seconds:.1%}" if seconds else None,
            ),
            ("Effective training time", show(self.goodput, lambda found: f"{found.share:.1%}")),
            ("Wall time", fmt_seconds(self.wall_seconds)),
            ("Restarts", str(len(self.restarts))),
            ("Steps computed again", str(self.recomputed)),
            ("Steps without a finite loss", str(broken) if broken else None),
        ]
        return [(name, value) for name, value in found if value is not None]


def _is_incident(record: Record) -> bool:
    """An upload is one only where it failed, and says why."""
    return record["event"] in INCIDENTS and (record["event"] != "upload" or "why" in record)


def values(records: Iterable[Record], key: str) -> list[float]:
    """The finite values of `key`, in order."""
    return [float(r[key]) for r in records if r.get(key) is not None and math.isfinite(r[key])]


def last(records: Sequence[Record], key: str) -> float | None:
    """The last finite value of `key`."""
    return (values(records, key) or [None])[-1]  # type: ignore[list-item]


def middle(records: Sequence[Record], key: str) -> float | None:
    """The median of `key`'s finite values."""
    found = values(records, key)
    return median(found) if found else None


def show(value: Any, how: Any) -> str | None:
    """`how(value)`, or None where there is no value."""
    return None if value is None else how(value)


def _running_seconds(records: Sequence[Record], starts: list[int]) -> float:
    """Seconds from the first to the last record of every start, without the time in a queue between them."""
    borders = [*(starts or [0]), len(records)]
    parts = [records[a:b] for a, b in zip(borders, borders[1:], strict=False)]
    return sum(part[-1]["time"] - part[0]["time"] for part in parts if part)
