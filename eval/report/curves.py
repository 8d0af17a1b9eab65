"""Curves of a report as inline SVG, drawn by matplotlib and coloured by the page's CSS variables."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import TYPE_CHECKING, Any

from millrace.core.units import fmt_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib needs colours; the SVG gets variables in their place, so that it follows the page into dark mode.
_INK, _MUTED, _GRID, _FIRST, _SECOND, _MARK = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--line)",
    _FIRST: "var(--first)",
    _SECOND: "var(--second)",
    _MARK: "var(--mark)",
}
_POINTS = 500
_WIDTH, _HEIGHT = 6.2, 2.9


@dataclass(frozen=True)
class Series:
    """One line: `x` and `y` of equal length; `role` is "first", "second", "faint" or a colour "#rrggbb"."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    role: str = "first"
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A titled chart; `marks` are steps the run returned to, `tokens` gives a second x axis (steps, tokens).

    `scale` is "linear", "log" or "percent". `skip` is the share of first points that may run off the top.
    """

    title: str
    series: list[Series]
    marks: Sequence[float] = ()
    tokens: tuple[Sequence[float], Sequence[float]] | None = None
    scale: str = "linear"
    skip: float = 0.0

    def legend(self) -> list[tuple[str, str]]:
        """(name, CSS colour) of the lines worth naming: all, or the first, middle and last of many."""
        named = [s for s in self.series if s.role != "faint"]
        if len(named) > 8:
            named = [named[0], named[len(named) // 2], named[-1]]
        # A line that bears the title needs no second name.
        return [(s.name, _css(s.role)) for s in named if s.name != self.title]


def _css(role: str) -> str:
    return f"var(--{role})" if role in ("first", "second") else role


def thin(x: Sequence[float], y: Sequence[float], points: int = _POINTS) -> tuple[list[float], list[float]]:
    """About `points` points of a curve, among them both ends and every stretch's lowest and highest value."""
    count = len(x)
    if count <= points:
        return list(x), list(y)
    size = math.ceil(2 * count / points)
    kept = {0, count - 1}
    for start in range(0, count, size):
        stretch = [i for i in range(start, min(start + size, count)) if math.isfinite(y[i])]
        if stretch:
            kept |= {min(stretch, key=y.__getitem__), max(stretch, key=y.__getitem__)}
        # A gap stays a gap.
        gaps = (i for i in range(start, min(start + size, count)) if not math.isfinite(y[i]))
        kept |= set(islice(gaps, 1))
    order = sorted(kept)
    return [x[i] for i in order], [y[i] for i in order]


def smooth(y: Sequence[float], share: float = 0.005, least: int = 10) -> list[float]:
    """Exponential average over about `share` of the points, but no fewer than `least`.

    Its beginning is corrected as Adam's moments are (https://arxiv.org/abs/1412.6980, section 3).
    """
    rate = 1 / max(least, share * len(y))
    mean = weight = 0.0
    out = []
    for value in y:
        if math.isfinite(value):
            mean += rate * (value - mean)
            weight += rate * (1 - weight)
        out.append(mean / weight if weight else math.nan)
    return out


def draw(chart: Chart) -> str:
    """The chart as an `<svg>` element: no script, no external reference, text as text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": chart.title, "font.size": 10}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        names = {f"series-{n}": series.name for n, series in enumerate(chart.series)}
        for gid, series in zip(names, chart.series, strict=True):
            _line(axes, series, gid)
        _axes(axes, chart)
        _limits(axes, chart)
        for step in chart.marks:
            axes.axvline(step, color=_MARK, linewidth=1, linestyle=(0, (3, 3)), zorder=1.5, gid="restart")
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(file.getvalue(), chart.title, names)


def _line(axes: Axes, series: Series, gid: str) -> None:
    x, y = thin(series.x, series.y)
    colour = {"first": _FIRST, "faint": _FIRST, "second": _SECOND}.get(series.role, series.role)
    alone = sum(map(math.isfinite, y)) == 1
    axes.plot(
        x,
        y,
        color=colour,
        alpha=0.28 if series.role == "faint" else 1.0,
        linewidth=1.0 if series.role == "faint" else 1.7,
        marker="o" if series.dots or alone else None,
        markersize=3.5,
        markeredgewidth=0,
        solid_joinstyle="round",
        gid=gid,
    )


def _axes(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(which="both", colors=_MUTED, length=0, pad=5)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("steps", color=_MUTED, fontsize=9, loc="right", labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: fmt_count(value)))
    drawn = [value for series in chart.series for value in series.y if math.isfinite(value)]
    # Below a factor of five a logarithmic axis has hardly a round number to label.
    if chart.scale == "log" and drawn and min(drawn) > 0 and max(drawn) / min(drawn) > 5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(drawn) / min(drawn) < 1e3 else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    end = "%" if chart.scale == "percent" else ""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value) + end))
    if chart.tokens is not None:
        _token_axis(axes, chart.tokens)


def _number(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return fmt_count(value) if abs(value) >= 1e4 else f"{value:.4g}"


def _token_axis(axes: Axes, tokens: tuple[Sequence[float], Sequence[float]]) -> None:
    """Tokens on the upper edge: the positions of the lower axis's ticks, labelled with the tokens seen by then."""
    import numpy as np
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    steps, seen = tokens

    def seen_by(step: float) -> str:
        inside = steps[0] <= step <= steps[-1]
        return fmt_count(float(np.interp(step, steps, seen))) if inside else ""

    upper = axes.secondary_xaxis("top")
    upper.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    upper.xaxis.set_major_formatter(FuncFormatter(lambda step, _: seen_by(step)))
    upper.tick_params(colors=_MUTED, length=0, pad=2)
    upper.spines["top"].set_visible(False)
    upper.set_xlabel("tokens", color=_MUTED, fontsize=9, loc="right", labelpad=3)


def _limits(axes: Axes, chart: Chart) -> None:
    if chart.scale == "log":
        return
    shown = [
        value
        for series in chart.series
        for value in series.y[int(chart.skip * len(series.y)) :]
        if math.isfinite(value)
    ]
    if not shown:
        return
    low, high = min(shown), max(shown)
    space = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - space if low - space > 0 or low < 0 else 0.0, high + space)


def _inline(svg: str, title: str, names: dict[str, str]) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    for gid, name in names.items():
        # The browser shows a line's name under the pointer.
        svg = svg.replace(f'<g id="{gid}">', f"<g><title>{escape(name)}</title>")
    svg = svg.replace('<g id="restart">', "<g><title>restart</title>")
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    size = re.search(r'viewBox="([^"]*)"', svg)
    assert size is not None
    body = svg[svg.index(">") + 1 :]
    return f'<svg viewBox="{size[1]}" role="img" aria-label="{escape(title, quote=True)}">{body}'
