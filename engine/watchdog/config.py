"""The watchdog's section."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from millrace.core.config import option
from millrace.core.errors import UserError
from millrace.core.units import Duration


def _minutes(count: int, help: str) -> Any:
    return option(Duration(60 * count, "s"), help)


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogConfig:
    """How long each part of a step may take before the run is ended as hanging, to be continued."""

    enabled: bool = option(True, "a process beside every rank watches it")
    start: Duration = _minutes(60, "from joining the group to the first step: building, loading, compiling kernels")
    first: Duration = _minutes(60, "forward and backward of the first step of a start, with compilation")
    step: Duration = _minutes(20, "forward and backward of a step, or the optimiser's part")
    collective: Duration = _minutes(20, "waiting for the slowest rank between the parts of a step")
    data: Duration = _minutes(20, "waiting for a batch")
    save: Duration = _minutes(60, "writing a checkpoint")
    eval: Duration = _minutes(120, "an evaluation, and the report at the end")

    def __post_init__(self) -> None:
        for name, limit in self.limits().items():
            if limit <= 0:
                raise UserError(f"watchdog.{name} = '{getattr(self, name)}': give a time, such as '20 min'")

    def limits(self) -> dict[str, float]:
        """Seconds by section; 0 for what is not a time."""
        times = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "enabled"}
        return {name: float(time.value) if time.unit == "s" else 0.0 for name, time in times.items()}
