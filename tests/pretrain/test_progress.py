"""The live display: what it shows, how seldom, and that it leaves the terminal as it was."""

from __future__ import annotations

import math
import re
from io import StringIO

import pytest
from rich.console import Console

from millrace.pretrain.progress import Progress

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def console(terminal: bool, width: int = 80) -> Console:
    return Console(file=StringIO(), force_terminal=terminal, width=width, height=30, color_system=None)


def text(out: Console) -> str:
    return out.file.getvalue()  # type: ignore[attr-defined]


def record(step: int, seconds: float = 1.0, **changes: object) -> dict:
    made = {"event": "step", "step": step, "loss": 3.25, "bpb": 1.5, "tokens": 1000, "tokens_total": 1000 * step}
    made |= {"seconds": seconds, "data_wait": 0.1 * seconds, "tokens_per_s": 1000 / seconds, "mfu": 0.42}
    return made | changes


def feed(progress: Progress, clock: Clock, first: int, last: int, **changes: object) -> None:
    for step in range(first, last + 1):
        clock.now += 1.0
        progress.update(record(step, **changes))


def plain(first: int = 1, last: int = 40, changes: dict | None = None, **totals: float) -> str:
    out, clock = console(False), Clock()
    with Progress(**totals, console=out, clock=clock) as progress:  # type: ignore[arg-type]
        feed(progress, clock, first, last, **(changes or {}))
    return text(out)


def test_plain_lines_without_a_terminal() -> None:
    lines = plain(total_steps=100).splitlines()
    assert [re.match(r"step (\d+)/100 ", line)[1] for line in lines] == ["1", "11", "21", "31", "40"]  # type: ignore[index]
    assert lines[-1] == (
        "step 40/100  tokens 40k  loss 3.2500  bits/byte 1.500  tokens/s 1k  MFU 42.0%  data wait 10.0%  left 1m00s"
    )


def test_the_last_line_is_not_printed_twice() -> None:
    assert len(plain(last=1).splitlines()) == 1


@pytest.mark.parametrize(
    ("totals", "left"),
    [
        ({"total_steps": 100}, "1m00s"),
        ({"total_tokens": 50_000}, "10.0s"),
        ({"total_seconds": 160.0}, "2m00s"),
        ({"total_steps": 100, "total_seconds": 60.0}, "20.0s"),
        ({}, None),
    ],
)
def test_time_left_by_the_first_limit(totals: dict, left: str | None) -> None:
    found = re.search(r"left (\S+)", plain(**totals).splitlines()[-1])
    assert (found and found[1]) == left


def test_time_left_of_a_continued_run_counts_only_what_is_left() -> None:
    assert "left 20.0s" in plain(61, 80, total_steps=100).splitlines()[-1]
    out, clock = console(False), Clock()
    with Progress(total_seconds=100, console=out, clock=clock) as progress:
        for step in range(61, 81):
            clock.now += 1.0
            progress.update(record(step, seconds_total=float(step)))
    assert "left 20.0s" in text(out).splitlines()[-1]


def test_evaluation_and_saving_count_towards_time_left() -> None:
    out, clock = console(False), Clock()
    with Progress(total_steps=20, console=out, clock=clock) as progress:
        for step in range(1, 11):
            clock.now += 3.0
            progress.update(record(step))
    assert "left 28.0s" in text(out).splitlines()[-1]


def test_a_nan_is_shown_and_then_forgotten() -> None:
    out, clock = console(False), Clock()
    with Progress(console=out, clock=clock) as progress:
        feed(progress, clock, 1, 1, loss=math.nan)
        clock.now += 20
        progress.update(record(2))
    assert ["loss nan" in line for line in text(out).splitlines()] == [True, False]


def test_records_without_optional_fields() -> None:
    assert "bits/byte" not in plain(changes={"bpb": None, "mfu": None}) and "MFU" not in plain(changes={"mfu": None})


@pytest.mark.parametrize("width", [80, 40])
def test_terminal_shows_everything_in_its_width(width: int) -> None:
    out, clock = console(True, width), Clock()
    with Progress(total_steps=1000, console=out, clock=clock) as progress:
        feed(progress, clock, 1, 500)
    last = text(out).rsplit("\x1b[2K", 1)[-1] if width == 80 else text(out)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text(out))
    assert all(len(line) <= width for line in re.split(r"[\r\n]", shown))
    if width == 80:
        for word in ("500/1,000", "500k", "3.2500", "1.500", "1k", "42.0%", "10.0%", "8m20s", "50%", "data wait"):
            assert word in shown, word
    assert last


def test_few_redraws(monkeypatch: pytest.MonkeyPatch) -> None:
    out = console(True)
    with Progress(total_steps=100_000, console=out) as progress:
        for step in range(1, 20_001):
            progress.update(record(step, 1e-4))
    # Two draws at the borders and four a second: 20,000 updates must not draw.
    assert text(out).count("tokens/s") < 20


def test_the_terminal_is_restored_on_an_exception() -> None:
    out = console(True)
    with pytest.raises(RuntimeError, match="boom"), Progress(total_steps=10, console=out) as progress:
        progress.update(record(1))
        assert HIDE_CURSOR in text(out) and SHOW_CURSOR not in text(out)
        raise RuntimeError("boom")
    assert text(out).rindex(SHOW_CURSOR) > text(out).rindex(HIDE_CURSOR)
    assert out._live is None if hasattr(out, "_live") else True


@pytest.mark.parametrize("terminal", [True, False])
def test_say_prints_the_text_as_it_is(terminal: bool) -> None:
    out = console(terminal)
    with Progress(console=out) as progress:
        progress.say("step 4: [bold]held-out[/bold] " + "x" * 100)
    assert "[bold]held-out[/bold] " + "x" * 100 in text(out)


@pytest.mark.parametrize("terminal", [True, False])
def test_other_ranks_are_silent(terminal: bool) -> None:
    out = console(terminal)
    with Progress(total_steps=2, enabled=False, console=out) as progress:
        progress.update(record(1))
        progress.say("hello")
    assert text(out) == ""


def test_a_run_without_a_step_shows_nothing_wrong() -> None:
    assert plain(1, 0, total_steps=5) == ""
    out = console(True)
    with Progress(total_steps=5, console=out):
        pass
    assert "starting" in text(out)
