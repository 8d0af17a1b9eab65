"""The report as one page without script or external reference. Everything that comes from the data is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from millrace.core.units import fmt_count, fmt_size

_CSS = """
:root{--page:#f6f5f2;--card:#fff;--ink:#1c1e22;--muted:#6a6f78;--line:#e4e2dc;--bar:#2b62c9}
@media(prefers-color-scheme:dark){:root{--page:#111316;--card:#191c20;--ink:#e7e8ea;--muted:#969ca6;--line:#2c3037;
--bar:#6fa3ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:2.5rem clamp(1rem,4vw,2.5rem) 3rem}
h1{font-size:clamp(1.7rem,5vw,2.5rem);line-height:1.15;margin:.2rem 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.6rem 0 .9rem;overflow-wrap:anywhere}
.eyebrow,.note{color:var(--muted);font-size:.85rem;margin:.4rem 0}
.lead{font-size:1.08rem;margin:0}
.scroll,details{overflow:auto;background:var(--card);border:1px solid var(--line);border-radius:.7rem;
margin-bottom:.6rem}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.45rem 1rem;overflow-wrap:anywhere;vertical-align:top}
th{color:var(--muted);font-weight:500;font-size:.8rem;white-space:nowrap}
tbody tr{border-top:1px solid var(--line)}
i{display:block;height:.35rem;border-radius:.2rem;background:var(--bar);margin-top:.35rem;min-width:1px}
summary{cursor:pointer;padding:.6rem 1rem;font-weight:500;overflow-wrap:anywhere}
dl{margin:0;padding:.8rem 1rem;border-top:1px solid var(--line)}
dt{color:var(--muted);font-size:.8rem;overflow-wrap:anywhere}
dd{margin:.2rem 0 0;white-space:pre-wrap;overflow-wrap:anywhere;max-height:18rem;overflow:auto;
font:.82rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
"""

_STEPS = {
    "unreadable": "undecodable",
    "exact": "exact duplicate",
    "quality": "quality",
    "near": "near duplicate",
    "contamination": "contamination",
}


def page(name: str, report: dict[str, Any]) -> str:
    """The page of a report as `make_report` makes it."""
    body = "".join(
        [
            _header(name, report["total"]),
            *(_source(source) for source in report["sources"]),
            _evaluation(report.get("evaluation", [])),
            _method(report),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(name)} · curated</title><style>{_CSS}</style></head>\n"
        f"<body><main>\n{body}</main></body></html>\n"
    )


def _header(name: str, total: dict[str, Any]) -> str:
    rows = [_row("in", total["in"], total["in"])]
    rows += [_row(_STEPS[step], total["removed"][step], total["in"]) for step in _STEPS if step in total["removed"]]
    rows.append(_row("kept", total["kept"], total["in"]))
    share = 100 * total["kept"]["documents"] / total["in"]["documents"]
    lead = f"{total['kept']['documents']:,} of {total['in']['documents']:,} documents kept ({share:.1f}%)."
    return (
        f'<header><p class="eyebrow">curated corpus</p><h1>{escape(name)}</h1>'
        f'<p class="lead">{escape(lead)}</p></header>\n'
        + _table(["", "documents", "text", "share of the documents"], rows)
    )


def _row(name: str, counts: dict[str, int], total: dict[str, int]) -> list[str]:
    share = 100 * counts["documents"] / max(1, total["documents"])
    bar = f'{share:.2f}%<i style="width:{share:.2f}%"></i>'
    return [escape(name), f"{counts['documents']:,}", fmt_size(counts["bytes"]), bar]


def _source(source: dict[str, Any]) -> str:
    rows = [["", "in", *_row("", source["in"], source["in"])[1:]]]
    for rule in source["rules"]:
        step = _STEPS[rule["step"]] + (" (reported, kept)" if rule["kept"] else "")
        rows.append([escape(step), *_row(rule["rule"], rule, source["in"])])
    rows.append(["", "kept", *_row("", source["kept"], source["in"])[1:]])
    samples = "".join(_samples(rule) for rule in source["rules"] if rule["samples"])
    title = f"<h2>{escape(source['name'])}</h2>"
    table = _table(["step", "rule", "documents", "text", "share of the documents"], rows)
    return f"<section>{title}{table}{samples}</section>\n"


def _samples(rule: dict[str, Any]) -> str:
    title = f"{_STEPS[rule['step']]}: {rule['rule']} ({fmt_count(rule['documents'])})"
    return f"<details><summary>{escape(title)}</summary>{''.join(map(_sample, rule['samples']))}</details>\n"


def _sample(sample: dict[str, Any]) -> str:
    facts = [sample["id"], f"measured {sample['value']:.4g}", sample["detail"]]
    facts.append(f"kept in its place: {sample['kept']}" if sample["kept"] else "")
    more = " …" if sample["letters"] > len(sample["text"]) else ""
    return f"<dl><dt>{escape(' · '.join(filter(None, facts)))}</dt><dd>{escape(sample['text'])}{more}</dd></dl>"


def _evaluation(files: list[dict[str, Any]]) -> str:
    if not files:
        return ""
    rows = [[escape(file["path"]), *(f"{file[name]:,}" for name in ("lines", "checkable", "found"))] for file in files]
    note = "A line of fewer than 13 words cannot be found; a 13-gram of several lines counts for the first of them."
    head = ["file", "lines", "of 13 words or more", "found in the corpus"]
    return f'<section><h2>Evaluation sets</h2>{_table(head, rows)}<p class="note">{note}</p></section>\n'


def _method(report: dict[str, Any]) -> str:
    parts = []
    if "exact" in report:
        parts.append(f"Exact duplicates: {_clusters(report['exact'])}.")
    if "near" in report:
        parts.append(f"Near duplicates: {_clusters(report['near'])}. A pair is found with this probability:")
    text = "".join(f'<p class="note">{escape(part)}</p>' for part in parts)
    found = report.get("near", {}).get("found", {})
    curve = _table(["Jaccard similarity of the 5-grams", *found], [["found", *(f"{p:.3f}" for p in found.values())]])
    return f"<section><h2>Duplicates</h2>{text}{curve if found else ''}</section>\n" if parts else ""


def _clusters(sizes: dict[str, Any]) -> str:
    return f"{sizes['clusters']:,} clusters, {sizes['largest']:,} documents in the largest"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
