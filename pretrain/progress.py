"""Live progress of a run on stderr: a redrawn block in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from millrace.core.console import get_console
from millrace.core.units import fmt_count, fmt_seconds

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_REDRAWS_PER_SECOND = 4
_PLAIN_SECONDS = 10.0
# Weight of the newest step in the shown averages: about the last twenty steps.
_SMOOTH = 0.1


class Progress:
    """Shows step, loss, bits per byte, tokens/s, MFU, data-wait share and time left; a context manager.

    The run's length is whichever of `total_steps`, `total_tokens` and `total_seconds` (of training, over all
    starts) is given; none means unknown.
    `enabled` is true on rank 0 only. The terminal is restored however the block is left.
    """

    def __init__(
        self,
        total_steps: int | None = None,
        total_tokens: int | None = None,
        total_seconds: float | None = None,
        enabled: bool = True,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._totals = {"step": total_steps, "tokens_total": total_tokens, "seconds": total_seconds}
        self._enabled = enabled
        self._console = console
        self._clock = clock
        self._live: Live | None = None
        self._printed = -float("inf")
        self._began: float | None = None
        self._first: dict[str, float] = {}
        self._record: dict[str, Any] = {}
        self._shown: dict[str, Any] = {}
        self._mean: dict[str, float] = {}
        self._training = 0.0

    def __enter__(self) -> Progress:
        if not self._enabled:
            return self
        self._console = self._console or get_console()
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(
                console=self._console,
                get_renderable=self._block,
                refresh_per_second=_REDRAWS_PER_SECOND,
                # What others print goes above the block, unless it is on its way into a file or a pipe.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._record and self._record is not self._shown:
            self._plain()

    def update(self, record: dict[str, Any]) -> None:
        """Take in one "step" record of the ledger; never draws more than a few times a second."""
        if not self._enabled:
            return
        self._training += record["seconds"]
        if self._began is None:
            # The step that was just made lies before the first reading of the clock.
            self._began = self._clock() - record["seconds"]
            self._first = {key: self._reached(key, record) for key in self._totals}
            self._first["step"] -= 1
            self._first["tokens_total"] -= record["tokens"]
            self._first["seconds"] -= record["seconds"]
        self._record = record
        for key in ("loss", "bpb", "tokens_per_s", "mfu"):
            self._average(key, record.get(key))
        self._average("data", record.get("data_wait", 0.0) / max(record["seconds"], 1e-9))
        if self._live is None and self._clock() - self._printed >= _PLAIN_SECONDS:
            self._plain()

    def say(self, text: str) -> None:
        """Print a line above the display."""
        if self._enabled:
            (self._console or get_console()).print(text, markup=False, soft_wrap=True)

    def _average(self, key: str, value: float | None) -> None:
        if value is None:
            return
        old = self._mean.get(key)
        # A NaN is shown while it lasts, without staying in the average for ever.
        restart = old is None or old != old
        self._mean[key] = value if restart else old + _SMOOTH * (value - old)  # type: ignore[operator]

    def _reached(self, key: str, record: dict[str, Any]) -> float:
        if key == "seconds":
            # A continued run has trained before this process began, which only the loop knows.
            return float(record.get("seconds_total", self._training))
        return float(record.get(key, 0))

    def _progress(self) -> tuple[float, float | None]:
        """(share done in 0..1, seconds left) by the limit that will be met first; (0, None) when unknown."""
        best: tuple[float, float | None] = (0.0, None)
        for key, total in self._totals.items():
            if not total or not self._record:
                continue
            reached = self._reached(key, self._record)
            gained = reached - self._first[key]
            elapsed = self._clock() - (self._began or 0.0)
            left = max(total - reached, 0.0) * (elapsed / gained) if gained > 0 else None
            if left is not None and (best[1] is None or left < best[1]):
                best = (min(reached / total, 1.0), left)
        return best

    def _cells(self) -> list[tuple[str, str]]:
        """(label, value) of everything that is shown, in order."""
        if not self._record:
            return []
        step, total = self._record["step"], self._totals["step"]
        mean, left = self._mean, self._progress()[1]
        shown = [
            ("step", f"{step:,}/{total:,}" if total else f"{step:,}"),
            ("tokens", fmt_count(self._record.get("tokens_total", 0))),
            ("loss", f"{mean['loss']:.4f}" if "loss" in mean else ""),
            ("bits/byte", f"{mean['bpb']:.3f}" if "bpb" in mean else ""),
            ("tokens/s", fmt_count(mean["tokens_per_s"]) if "tokens_per_s" in mean else ""),
            ("MFU", f"{mean['mfu']:.1%}" if "mfu" in mean else ""),
            ("data wait", f"{mean['data']:.1%}"),
            ("left", fmt_seconds(left) if left is not None else ""),
        ]
        return [(label, value) for label, value in shown if value]

    def _plain(self) -> None:
        self._printed, self._shown = self._clock(), self._record
        self.say("  ".join(f"{label} {value}" for label, value in self._cells()))

    def _block(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        cells = self._cells()
        if not cells:
            return Text("starting: the first step compiles and warms up …", style="dim")
        share, left = self._progress()
        grid = Table.grid(padding=(0, 2))
        for _ in cells:
            grid.add_column(no_wrap=True)
        grid.add_row(*(Text(label, style="dim") for label, _ in cells))
        grid.add_row(*(Text(value, style="bold") for _, value in cells))
        if left is None:
            return grid
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=1.0, completed=share, width=60), Text(f"{share:.0%}", style="bold"))
        return Group(bar, grid)
