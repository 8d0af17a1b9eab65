"""`millrace report`: report.html from a run's ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from millrace.core.errors import UserError
from millrace.launch.arguments import Parser


def main(argv: Sequence[str]) -> int:
    """Write the report and print its path."""
    parser = Parser(
        prog="millrace report",
        description="Write report.html, one self-contained file, from a run's ledger.",
        epilog="example: millrace report runs/tiny",
    )
    parser.add_argument("run", help="run directory")
    options = parser.parse_args(list(argv))
    if not (Path(options.run) / "ledger.jsonl").is_file():
        raise UserError(f"{options.run} is not a run directory: it has no ledger.jsonl")
    from millrace.eval.report import write_report

    print(write_report(options.run))
    return 0
