"""`millrace prepare`: files or a data set into a manifest."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from millrace.core.config import Source, build
from millrace.core.console import get_console, say, show_table
from millrace.core.units import fmt_count, fmt_size


def main(argv: Sequence[str]) -> int:
    """Prepare, showing progress on a terminal; prints a table of what was counted."""
    options = _parser().parse_intermixed_args(list(argv))
    given = {k: v for k, v in vars(options).items() if v is not None}
    from millrace.data.prepare import PrepareConfig, prepare

    config = build(PrepareConfig, given, Source("the command line"))
    summary = prepare(config, _Shown())
    rows = [
        (part, s["name"], fmt_count(s["documents"]), fmt_size(s["bytes"]), fmt_count(s["tokens"]))
        for part, sources in (("train", summary.train), ("held out", summary.heldout))
        for s in sources
    ]
    done = "was already prepared" if summary.already_done else "is ready"
    show_table(f"{summary.out} {done}", ["part", "source", "documents", "text", "tokens"], rows)
    for skipped in summary.skipped:
        say(f"skipped: {skipped}")
    print(summary.out)
    return 0


class _Shown:
    """One line that is rewritten on a terminal; elsewhere a line at the start of each phase."""

    def __init__(self) -> None:
        self.phase = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        console = get_console()
        if console.is_terminal:
            share = f" {100 * done / total:5.1f}% of {fmt_size(total)}" if total else f" {fmt_count(done)}"
            console.print(f"\r{what}{share}  ", end="\n" if total and done >= total else "", markup=False)
        elif what != self.phase:
            say(f"{what} …")
        self.phase = what


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="millrace prepare",
        description="Turn files, folders, globs or data sets into a manifest: shards, token counts, a tokenizer. "
        "Interrupt it at any time; the same command continues.",
        epilog="example: millrace prepare books/ --out data/books --vocab-size 8k --heldout 0.05",
    )
    add: Any = parser.add_argument
    add("inputs", nargs="+", help="files, folders, globs, or datasets:NAME[:CONFIG[:SPLIT]]")
    add("--out", required=True, help="folder to write")
    add("--kind", help="auto (by suffix), jsonl, parquet or text")
    add("--text", help="column or field that holds the text (default: text)")
    add("--tokenizer", help="tokenizer folder, file or hub name (default: train a byte-level BPE)")
    add("--vocab-size", help="vocabulary of the tokenizer to train (default: 8192)")
    add("--train-bytes", help="text that the tokenizer is trained on, at most (default: 64 MiB)")
    add("--tokenize", action="store_const", const=True, help="write tokenised Parquet shards")
    add("--shard-size", help="size of shards that are written (default: 64 MiB)")
    add("--heldout", type=float, help="share of the documents to hold out, such as 0.05")
    add("--heldout-by", help="hash (of the document) or nth")
    add("--on-bad", help="stop (default) or skip, at a document that is not UTF-8")
    return parser
