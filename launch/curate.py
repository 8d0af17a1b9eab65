"""`millrace data curate`: a corpus without duplicates, junk and evaluation sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from millrace.core.config import Source, build
from millrace.core.console import say, show_table, warn
from millrace.core.units import fmt_size
from millrace.launch.arguments import Parser
from millrace.launch.prepare import Shown


def main(argv: Sequence[str]) -> int:
    """Curate, showing progress on a terminal; prints a table, and the folder to prepare."""
    options = _parser().parse_intermixed_args(list(argv))
    given = {k: v for k, v in vars(options).items() if v is not None}
    from millrace.data.curate.config import STEPS, CurateConfig
    from millrace.data.curate.curate import curate

    config = build(CurateConfig, given, Source("the command line"))
    result = curate(config, Shown())
    total = result.report["total"]
    parts = [("in", total["in"]), *((s, total["removed"].get(s)) for s in STEPS), ("kept", total["kept"])]
    rows = [(name, f"{counts['documents']:,}", fmt_size(counts["bytes"])) for name, counts in parts if counts]
    done = "was already curated" if result.already_done else "is curated"
    show_table(f"{config.out} {done}", ["", "documents", "text"], rows)
    for file in result.report.get("evaluation", []):
        if not file["checkable"]:
            warn(f"{file['path']}: no line has 13 words, so none can be found")
    if not total["kept"]["documents"]:
        warn("every document was removed; report.html says why")
    say(f"what was removed, and why: {config.out}/report.html")
    print(result.text)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="millrace data curate",
        description="Remove exact duplicates, documents of low quality, near duplicates and documents that hold text "
        "of evaluation sets, in this order. What is kept is written to OUT/text, for `millrace prepare`. Interrupt it "
        "at any time; the same command continues.",
        epilog="example: millrace data curate web/*.jsonl --eval tasks/*.jsonl --out data/curated",
    )
    add: Any = parser.add_argument
    add("inputs", nargs="+", help="files, folders or globs, as prepare takes them")
    add("--out", required=True, help="folder to write")
    add("--kind", help="auto (by suffix), jsonl, parquet or text")
    add("--text", help="column or field that holds the text (default: text)")
    for step, what in (
        ("exact", "exact duplicates (equal up to case and white space)"),
        ("quality", "documents that the rules of Gopher remove"),
        ("near", "near duplicates (MinHash over 5-grams of words)"),
    ):
        add(f"--no-{step}", dest=step, action="store_const", const=False, help=f"keep {what}")
    add("--eval", nargs="+", action="extend", help="evaluation files, whose 13-grams must not occur")
    add("--contaminated", help="remove (default) or report documents with such a 13-gram")
    add("--on-bad", help="stop (default) or skip, at a document that is not UTF-8")
    add("--samples", type=int, help="sample texts in the report, per source and rule (default: 3)")
    add("--workers", type=int, help="processes (default: one per core)")
    return parser
