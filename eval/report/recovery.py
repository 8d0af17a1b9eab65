"""How long a run took to go on after each interruption, by what it waited for, from its ledger alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from millrace.eval.report.goodput import began, each_start

Record = dict[str, Any]

PARTS = ("detect", "requeue", "down", "init", "load", "first step")


@dataclass(frozen=True)
class Recovery:
    """One return: why it was needed, where it went on, and seconds by part.

    detect: from the last record before to the end of the job; requeue: until the next job began; down: both, where no
    batch script noted them; init: until the run stood, without load: reading and verifying the checkpoint; first step:
    until the first step was recorded.
    """

    time: float
    step: int
    rejected: list[dict[str, str]]
    why: str
    again: int
    seconds: dict[str, float]


def recoveries(records: Sequence[Record]) -> list[Recovery]:
    """Of every start that went on from a checkpoint, in order."""
    parts = list(each_start(records))
    resumes = [record for record in records if record["event"] == "resume"]
    found = []
    for before, after in zip(parts, parts[1:], strict=False):
        resume = next((r for r in resumes if before[-1]["time"] <= r["time"] <= after[0]["time"]), None)
        if resume is not None:
            found.append(_recovery(before, resume, after))
    return found


def _recovery(before: list[Record], resume: Record, after: list[Record]) -> Recovery:
    ending = next((r for r in reversed(before) if r["event"] in ("end", "hang")), {})
    return Recovery(
        time=resume["time"],
        step=resume["step"],
        rejected=resume.get("rejected") or [],
        why=str(ending.get("why", "killed or lost: it recorded no end")),
        again=int(resume.get("again", 0)),
        seconds=_split(before[-1]["time"], resume, after),
    )


def _split(last: float, resume: Record, after: list[Record]) -> dict[str, float]:
    start = after[0]
    job, ended = start.get("job_began"), start.get("job_ended_before")
    seconds: dict[str, float] = {}
    if job is not None and ended is not None and last <= ended <= job:
        seconds |= {"detect": ended - last, "requeue": job - ended}
        stood = job
    else:
        stood = began(start)
        seconds["down"] = max(0.0, stood - last)
    load = float(resume.get("seconds", 0.0))
    seconds |= {"init": max(0.0, start["time"] - stood - load), "load": load}
    first = next((r["time"] for r in after if r["event"] == "step"), None)
    return seconds | ({"first step": first - start["time"]} if first is not None else {})
