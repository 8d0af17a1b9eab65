"""The report: one self-contained page, for every ledger that a run can leave behind."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import UserError
from millrace.core.ledger import Ledger
from millrace.eval.report import write_report
from millrace.eval.report.curves import Chart, Series, draw, smooth, thin
from millrace.eval.report.history import History
from millrace.eval.report.page import evenly

START = {"run_id": "r", "world": 2, "zero_stage": 2, "precision": "fp32", "params": 13_800_000, "versions": {"t": "1"}}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; fails on a tag that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def step(number: int, **changes: object) -> dict:
    loss = 3 + 5 * math.exp(-number / 20)
    record = {"step": number, "loss": loss, "bpb": loss / 3, "lr": 1e-3, "grad_norm": 0.5, "tokens": 100}
    record |= {"tokens_total": 100 * number, "seconds": 0.5, "data_wait": 0.05, "tokens_per_s": 200.0, "mfu": 0.4}
    return record | changes


def write(folder: Path, *records: tuple[str, dict], config: str | None = None) -> Path:
    with Ledger(folder / "ledger.jsonl") as book:
        for event, fields in records:
            book.append(event, **fields)
    if config is not None:
        (folder / "config.toml").write_text(config)
    return folder


def full_run(folder: Path, steps: int = 60) -> Path:
    records = [("start", START | {"resumed_from": None})]
    records += [("step", step(n)) for n in range(1, 41)]
    records += [("eval", {"step": 20, "loss": 4.0, "bpb": 1.5}), ("sample", {"step": 20, "prompt": "a", "text": "b"})]
    records += [("checkpoint", {"step": 30, "seconds": 1.0, "bytes": 2**20})]
    records += [("resume", {"step": 30, "from": "step-30", "rejected": [{"path": "step-40", "why": "torn"}]})]
    records += [("start", START | {"resumed_from": 30})]
    records += [("step", step(n)) for n in range(31, steps + 1)]
    records += [("norms", {"step": n, "grad": {"l0": 0.1}, "weight": {"l0": 9.0}, "max_logit": 7.0}) for n in (50, 60)]
    records += [("eval", {"step": steps, "loss": 3.6, "bpb": 1.25}), ("end", {"step": 60, "outcome": 0, "why": "done"})]
    return write(folder, *records, config='[run]\nname = "x"\n')


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_every_part_of_a_full_run_is_there(tmp_path: Path) -> None:
    page = page_of(full_run(tmp_path / "my-run"))
    titles = re.findall(r"(Loss, nats|Bits per byte|Throughput|Model-FLOPs utilisation|waiting for data|Learning rate"
                        r"|Gradient norm by|Weight norm|Largest logit|Samples|Restarts|Checkpoints|Configuration)",
                        page.text)  # fmt: skip
    assert len(set(titles)) == 13
    assert page.tags.count("svg") == 10
    for text in ("my-run", "finished: done", "13.8M", "1.25", "1.0 MiB", "step-40: torn", 'name = "x"'):
        assert text in page.text, text


def test_key_figures_are_those_of_the_effective_history(tmp_path: Path) -> None:
    from millrace.core.ledger import read

    run = full_run(tmp_path)
    figures = dict(History.of(read(run / "ledger.jsonl")).figures())
    tail = [3 + 5 * math.exp(-n / 20) for n in range(41, 61)]
    assert figures["Steps"] == "60" and figures["Tokens"] == "6k"
    assert figures["Training loss, last 20 steps"] == f"{sum(tail) / 20:.4f}"
    assert figures["Held-out bits per byte"] == "1.2500"
    assert figures["Time spent waiting for data"] == "10.0%"
    assert figures["Model-FLOPs utilisation, median"] == "40.0%"
    assert (figures["Restarts"], figures["Steps computed again"]) == ("1", "10")
    assert "Steps without a finite loss" not in figures


def test_what_went_wrong_is_listed(tmp_path: Path) -> None:
    upload = {"step": 3, "to": "s3://bucket/tiny/step-00000003", "seconds": 2.0}
    told = [("skip", {"step": 2, "why": "loss is nan"}), ("upload", upload | {"bytes": 9})]
    told += [("upload", upload | {"bytes": 0, "why": "connection refused"})]
    text = page_of(write(tmp_path, ("start", START), ("step", step(1)), *told)).text
    assert "Incidents" in text and "loss is nan" in text and "connection refused" in text
    assert text.count("checkpoint not in the object store") == 1


def test_wall_time_leaves_out_the_queue() -> None:
    times = [("start", 0), ("step", 10), ("start", 1000), ("step", 1005), ("end", 1006)]
    records = [{"event": e, "time": float(t), "step": n, "resumed_from": 1} for n, (e, t) in enumerate(times)]
    assert History.of(records).wall_seconds == 16


def test_the_page_asks_for_nothing_and_runs_nothing(tmp_path: Path) -> None:
    text = write_report(full_run(tmp_path)).read_text()
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for key, value in page.attributes:
        assert key not in ("src", "srcset", "action") and not key.startswith("on"), key
        if key in ("href", "xlink:href"):
            assert value.startswith("#"), value
    assert not re.findall(r"@import|url\((?!#)", text)
    assert set(re.findall(r"https?://[^\s\"<]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_text_of_the_run_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&\"'"
    records = [("start", START | {"precision": evil}), ("step", step(1))]
    records.insert(0, ("resume", {"step": 0, "from": evil}))
    records += [("sample", {"step": 1, "prompt": evil, "text": evil + evil})]
    records += [("norms", {"step": 1, "grad": {evil: 1.0}}), ("end", {"step": 1, "outcome": 93, "why": evil})]
    page = page_of(write(tmp_path / "<b>&", *records, config=evil))
    assert "script" not in page.tags and "mark" in page.tags
    assert page.text.count(evil) >= 6
    assert "<b>&" in page.text


ODD = {
    "empty": [],
    "only started": [("start", START)],
    "one step": [("start", START), ("step", step(1))],
    "one step and one evaluation": [("step", step(1)), ("eval", {"step": 1, "loss": 2.0, "bpb": 1.0})],
    "only an evaluation": [("eval", {"step": 0, "loss": 2.0, "bpb": 1.0})],
    "bare steps": [("step", {"step": 1}), ("step", {"step": 2})],
    "never finite": [("step", step(n, loss=math.nan, bpb=math.inf, grad_norm=math.nan)) for n in (1, 2, 3)],
    "constant": [("step", step(n, loss=2.0, bpb=1.0)) for n in range(1, 9)],
    "zeros": [("step", step(n, loss=0.0, bpb=0.0, grad_norm=0.0, seconds=0.0, mfu=0.0)) for n in range(1, 90)],
    "negative": [("step", step(n, loss=-1.0 * n, grad_norm=-1.0)) for n in range(1, 90)],
    "undone": [("start", START), ("step", step(1)), ("start", START | {"resumed_from": None})],
    "empty norms": [("step", step(1)), ("norms", {"step": 1, "grad": {}, "weight": {}, "max_logit": math.inf})],
    "unknown events": [("step", step(1)), ("quarantine", {"step": 1, "sample": 3}), ("novel", {})],
    "unknown outcome": [("step", step(1)), ("end", {"step": 1, "outcome": 7})],
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("error")
def test_odd_ledgers_make_a_page(tmp_path: Path, name: str) -> None:
    write(tmp_path, ("note", {}), *ODD[name])
    page = page_of(tmp_path)
    assert "figures" in dict(page.attributes).values() or page.tags.count("dl") == 1
    steps = any(event in ("step", "eval") and "loss" in fields for event, fields in ODD[name])
    assert ("svg" in page.tags) == (steps and name != "undone")


def test_a_broken_step_is_told_and_leaves_a_gap(tmp_path: Path) -> None:
    records = [("step", step(n, loss=math.nan if n == 5 else 2.0)) for n in range(1, 10)]
    page = page_of(write(tmp_path, *records))
    assert "Steps without a finite loss1" in page.text


@pytest.mark.parametrize(
    ("code", "words"), [(0, "finished"), (75, "paused, to be continued"), (93, "stopped"), (None, "no end recorded")]
)
def test_outcomes(tmp_path: Path, code: int | None, words: str) -> None:
    end = [("end", {"step": 1, "outcome": code, "why": ""})] if code is not None else []
    assert words in page_of(write(tmp_path, ("start", START), ("step", step(1)), *end)).text


def test_a_continued_run_is_not_called_ended(tmp_path: Path) -> None:
    records = [("start", START), ("step", step(1)), ("end", {"step": 1, "outcome": 75, "why": "signal"})]
    assert "no end recorded" in page_of(write(tmp_path, *records, ("start", START | {"resumed_from": 1}))).text


def test_long_runs_stay_small(tmp_path: Path) -> None:
    names = [f"layers.{n}" for n in range(40)]
    records: list[tuple[str, dict]] = []
    for n in range(1, 10_001):
        records.append(("step", step(n, loss=2 + math.sin(n * 1.7), grad_norm=1 + math.cos(n) ** 2)))
        if n % 50 == 0:
            records.append(("norms", {"step": n, "grad": dict.fromkeys(names, 1.0 + n % 7), "max_logit": 1.0}))
        if n % 20 == 0:
            records.append(("sample", {"step": n, "prompt": "p", "text": "t" * 5000}))
            records.append(("checkpoint", {"step": n, "seconds": 1.0, "bytes": 1}))
    assert write_report(write(tmp_path, *records)).stat().st_size < 1_500_000


def test_no_ledger_and_damaged_ledger(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the ledger"):
        write_report(tmp_path)
    (tmp_path / "ledger.jsonl").write_text('broken\n{"event":"start","time":1}\n')
    with pytest.raises(UserError, match="ledger.jsonl:1 is damaged"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_an_old_report_survives_a_failed_one(tmp_path: Path) -> None:
    write_report(write(tmp_path, ("step", step(1))))
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "ledger.jsonl").write_text("broken\nbroken\n")
    with pytest.raises(UserError):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


def test_a_chart_is_well_formed_and_follows_the_page_colours() -> None:
    lines = [Series("a<b", [0, 1, 2], [3.0, math.nan, 1.0]), Series("c", [0], [2.0], "second")]
    svg = draw(Chart('T"<', lines, marks=[1], tokens=([0, 2], [0, 2000])))
    root = ET.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))
    assert root.get("aria-label") == 'T"<' and root.get("viewBox")
    titles = [element.text for element in root.iter() if element.tag.endswith("title")]
    assert titles == ["restart", "a<b", "c"]
    assert "var(--first)" in svg and "var(--second)" in svg and "#0" not in svg.replace("url(#", "")
    labels = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "tokens" in labels and "2k" in labels


FLOATS = st.floats(-1e6, 1e6) | st.just(math.nan)


@given(st.lists(FLOATS, min_size=1, max_size=400), st.integers(4, 50))
def test_thinning_keeps_ends_and_extremes(y: list[float], points: int) -> None:
    x = [float(i) for i in range(len(y))]
    xs, ys = thin(x, y, points)
    assert xs == sorted(set(xs)) and (xs[0], xs[-1]) == (x[0], x[-1])
    assert all(a == b or (a != a and b != b) for a, b in zip(ys, (y[int(i)] for i in xs), strict=True))
    assert len(xs) <= max(points, 1.5 * points + 3)
    finite = [v for v in y if math.isfinite(v)]
    if finite:
        kept = [v for v in ys if math.isfinite(v)]
        assert (min(kept), max(kept)) == (min(finite), max(finite))
    assert any(math.isnan(v) for v in ys) == any(math.isnan(v) for v in y)


def test_smoothing_is_the_corrected_average() -> None:
    assert smooth([2.0] * 30) == pytest.approx([2.0] * 30)
    assert smooth([1.0, 3.0], least=2) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 3) / 0.75])
    assert smooth([math.nan, 1.0])[1] == 1.0 and math.isnan(smooth([math.nan])[0])


def test_evenly_keeps_first_and_last() -> None:
    items = [{"step": n} for n in range(100)]
    got = [item["step"] for item in evenly(items, 12)]
    assert (got[0], got[-1], len(set(got))) == (0, 99, 12)
    assert evenly(items[:5], 12) == items[:5]
