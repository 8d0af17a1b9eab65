"""The report's page: sections of HTML around the curves. Everything that comes from a run is escaped."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from millrace.core.errors import UserError
from millrace.core.ledger import read
from millrace.core.rundir import RunDir, write_atomic
from millrace.core.units import fmt_seconds, fmt_size
from millrace.eval.report.charts import charts
from millrace.eval.report.curves import Chart, draw
from millrace.eval.report.goodput import CAUSES, Goodput
from millrace.eval.report.history import INCIDENTS, History, Record
from millrace.eval.report.recovery import PARTS
from millrace.eval.report.style import CSS

# A long run draws hundreds of samples and checkpoints; the page shows some of them, first and last included.
_SAMPLE_STEPS = 12
_SAMPLE_LETTERS = 1500
_ROWS = 40


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into the run directory, from its ledger and config.toml alone, and return its path.

    One file without script or external reference, in light or dark as the reader's system is set. It may be
    written while the run goes on.

    Raises:
        UserError: no ledger there, or a damaged one.
    """
    run = RunDir(run_dir)
    history = History.of(read(run.ledger))
    config = run.config.read_text(encoding="utf-8", errors="replace") if run.config.exists() else ""
    try:
        write_atomic(run.report, _page(run.path.resolve(), history, config))
    except OSError as error:
        raise UserError(f"cannot write {run.report}: {error.strerror}") from None
    return run.report


def _page(folder: Path, history: History, config: str) -> str:
    name, title = folder.name, escape(folder.name)
    sections = [
        _header(name, history),
        _figures(history),
        _charts(history),
        _samples(history.samples, folder),
        _time(history.goodput),
        _incidents(history.incidents),
        _restarts(history),
        _checkpoints(history.checkpoints),
        _configuration(config, history.start),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title} · millrace</title><style>{CSS}</style></head>\n"
        f"<body><main>\n{''.join(sections)}"
        f"<footer>written by millrace, {_when(time.time())}</footer></main></body></html>\n"
    )


def _header(name: str, history: History) -> str:
    words, kind = history.outcome()
    started = f" · started {_when(history.started)}" if history.started is not None else ""
    return (
        f'<header><p class="eyebrow">training run{started}</p><h1>{escape(name)}</h1>'
        f'<p class="lead">{escape(history.summary())}</p>'
        f'<p><span class="badge {kind}">{escape(words)}</span></p></header>\n'
    )


def _figures(history: History) -> str:
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in history.figures())
    return f'<section><dl class="figures">{cells}</dl></section>\n'


def _charts(history: History) -> str:
    if not history.steps and not history.evals:
        return '<section><p class="empty">No curve yet: the ledger holds no step.</p></section>\n'
    body = "".join(_figure(chart) for chart in charts(history))
    return f'<section><h2>Curves</h2><div class="charts">{body}</div></section>\n'


def _figure(chart: Chart) -> str:
    keys = "".join(
        f'<span><i style="background:{colour}"></i>{escape(label)}</span>' for label, colour in chart.legend()
    )
    if chart.marks:
        keys += '<span><i class="dashed"></i>restart</span>'
    head = f"<figcaption><h3>{escape(chart.title)}</h3><p>{keys}</p></figcaption>"
    return f"<figure>{head}{draw(chart)}</figure>\n"


def _samples(samples: Sequence[Record], folder: Path) -> str:
    prompts: dict[str, list[Record]] = {}
    for record in samples:
        prompts.setdefault(f"{record.get('prompt', '')}\0{record.get('to', '')}", []).append(record)
    if not prompts:
        return ""
    blocks = []
    for key, records in prompts.items():
        prompt = key.partition("\0")[0]
        rows = "".join(
            f"<div><b>step {record['step']:,}</b><p>{_sample_text(prompt, record)}"
            f"{''.join(_medium(folder, name, path) for name, path in record.get('files', {}).items())}</p></div>"
            for record in evenly(records, _SAMPLE_STEPS)
        )
        blocks.append(f'<article class="sample">{rows}</article>')
    return f"<section><h2>Samples</h2>{''.join(blocks)}</section>\n"


def _medium(folder: Path, name: str, path: str) -> str:
    """A picture or a sound of a sample, inside the page."""
    try:
        content = base64.b64encode((folder / path).read_bytes()).decode()
    except OSError:
        return f'<span class="medium">{escape(path)} is gone</span>'
    label = escape(name.partition(".")[0])
    kind = "audio/wav" if path.endswith(".wav") else "image/png"
    source = f'src="data:{kind};base64,{content}"'
    inside = f"<audio controls {source}></audio>" if kind == "audio/wav" else f'<img alt="{label}" {source}>'
    return f'<span class="medium">{inside}<small>{label}</small></span>'


def _sample_text(prompt: str, record: Record) -> str:
    text = str(record.get("text", "")).removeprefix(prompt)
    more = " …" if len(text) > _SAMPLE_LETTERS else ""
    to = f" <small>to {escape(str(record['to']))}</small> " if "to" in record else ""
    return f"<mark>{escape(prompt)}</mark>{to}{escape(text[:_SAMPLE_LETTERS])}{more}"


def _time(found: Goodput | None) -> str:
    """A bar of where the time went, and a table beside it."""
    if found is None or found.total <= 0:
        return ""
    causes = [(cause, seconds) for cause, seconds in found.seconds.items() if seconds > 0]
    bar = "".join(
        f'<i class="{cause}" style="width:{seconds / found.total:.2%}" title="{escape(CAUSES[cause])}"></i>'
        for cause, seconds in causes
    )
    rows = "".join(
        f'<tr><td><i class="{cause}"></i>{escape(CAUSES[cause])}</td><td>{fmt_seconds(seconds)}</td>'
        f"<td>{seconds / found.total:.1%}</td></tr>"
        for cause, seconds in causes
    )
    table = f'<div class="scroll"><table class="time"><tbody>{rows}</tbody></table></div>'
    return f'<section><h2>Where the time went</h2><div class="bar">{bar}</div>{table}</section>\n'


def _incidents(records: Sequence[Record]) -> str:
    rows = [
        [_when(record["time"]), f"{record.get('step', 0):,}", INCIDENTS[record["event"]], _told(record)]
        for record in evenly(records, _ROWS)
    ]
    return _table("Incidents", ["time", "step", "what", "details"], rows, len(records))


def _told(record: Record) -> str:
    """What an incident's record says, in words where it has them."""
    if "why" in record:
        where = f"sample {record['sample']} of {record.get('shard')}: " if "sample" in record else ""
        back = f"to step {record['to']}: " if "to" in record else ""
        return f"{where}{back}{record['why']}"
    known = {key: value for key, value in record.items() if key not in ("event", "time", "owner", "step")}
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in known.items()
    )


def _restarts(history: History) -> str:
    """A row for each: why, where it went on, and how long that took, by part."""
    rows = []
    for found in history.recoveries[-_ROWS:]:
        parts = ", ".join(f"{part} {fmt_seconds(found.seconds[part])}" for part in PARTS if part in found.seconds)
        took = f"{fmt_seconds(sum(found.seconds.values()))}: {parts}"
        refused = "; ".join(f"{r.get('path')}: {r.get('why')}" for r in found.rejected)
        row = [_when(found.time), f"{found.step:,}", f"{found.again:,}", found.why, took, refused or "none"]
        rows.append(row)
    head = ["time", "from step", "steps again", "why", "time to go on", "checkpoints refused"]
    return _table("Restarts", head, rows, len(history.recoveries))


def _checkpoints(records: Sequence[Record]) -> str:
    rows = [
        [f"{r['step']:,}", _when(r["time"]), fmt_size(r.get("bytes", 0)), fmt_seconds(r.get("seconds", 0.0))]
        for r in evenly(records, _ROWS)
    ]
    return _table("Checkpoints", ["step", "time", "size", "time to write"], rows, len(records))


def _configuration(config: str, start: Record) -> str:
    facts = {key: value for key, value in start.items() if key not in ("event", "time", "versions")}
    facts |= {f"{name} version": version for name, version in (start.get("versions") or {}).items()}
    rows = [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in facts.items()]
    toml = f"<details><summary>config.toml</summary><pre>{escape(config)}</pre></details>" if config else ""
    facts_table = _table("", ["start of the run", ""], rows, len(rows))
    facts_block = f"<details><summary>environment</summary>{facts_table}</details>" if rows else ""
    return f"<section><h2>Configuration</h2>{toml}{facts_block}</section>\n" if toml or rows else ""


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], total: int) -> str:
    if not rows:
        return ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    note = f'<p class="note">{len(rows)} of {total} shown</p>' if len(rows) < total else ""
    table = f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>{note}'
    return f"<section><h2>{escape(title)}</h2>{table}</section>\n" if title else table


def evenly(items: Sequence[Record], limit: int) -> list[Record]:
    """At most `limit` of the items, evenly spread, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
