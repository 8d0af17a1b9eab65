"""What `millrace data curate` is told."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from millrace.core.config import option
from millrace.core.errors import did_you_mean
from millrace.data import SOURCES

# In the order in which they are taken: a document is removed by the first that objects to it.
STEPS = ("unreadable", "exact", "quality", "near", "contamination")


@dataclass(frozen=True, kw_only=True, slots=True)
class CurateConfig:
    """Inputs, steps, and where the result goes."""

    inputs: list[str] = option([], "files, folders or globs, as `millrace prepare` takes them")
    out: str = option("", "folder to write")
    kind: str = option("auto", f"format of the files: auto (by suffix), {', '.join(SOURCES)}")
    text: str = option("text", "column or field that holds the text")
    exact: bool = option(True, "remove exact duplicates, up to case and white space")
    quality: bool = option(True, "remove by the rules of quality and repetition of Gopher")
    near: bool = option(True, "remove near duplicates (MinHash over 5-grams of words)")
    eval: list[str] = option([], "evaluation files whose 13-grams must not occur: JSONL, Parquet or text")
    contaminated: Literal["remove", "report"] = option("remove", "what happens to documents with such a 13-gram")
    on_bad: Literal["stop", "skip"] = option("stop", "what an undecodable document does")
    samples: int = option(3, "sample texts in the report, per source and rule")
    workers: int = option(0, "processes (0: one per core); the result does not depend on it")

    def __post_init__(self) -> None:
        if self.kind != "auto" and self.kind not in SOURCES:
            known = ", ".join(("auto", *SOURCES))
            raise ValueError(f"kind = '{self.kind}': expected one of {known}{did_you_mean(self.kind, SOURCES)}")
        for name in ("samples", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")

    def processes(self) -> int:
        """How many processes to use."""
        return self.workers or len(os.sched_getaffinity(0))

    def options(self) -> dict[str, Any]:
        """What the result depends on besides the files."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("out", "workers")}
