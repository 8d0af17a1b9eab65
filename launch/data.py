"""`millrace data SUBCOMMAND …`: what is done with data outside a run."""

from __future__ import annotations

from collections.abc import Sequence

from millrace.core.console import show_table
from millrace.core.units import fmt_size
from millrace.launch.arguments import Parser, run_subcommand

# name -> (what it does, an example, where it is)
SUBCOMMANDS = {
    "index": ("index files where they lie", "millrace data index s3://bucket/web/ --out data/web", "prepare:index"),
    "curate": (
        "remove duplicates, bad text and evaluation text",
        "millrace data curate 'web/*.jsonl' --out data/curated",
        "curate:main",
    ),
    "verify": ("hash all shards again", "millrace data verify data/web", "data:verify"),
    "stat": (
        "what a corpus holds, and what a run makes of it",
        "millrace data stat data.manifest=data/web",
        "stream:stat",
    ),
    "peek": ("a batch exactly as the model will see it", "millrace data peek run.toml --step 100", "stream:peek"),
    "simulate": (
        "plan a stream at any number of nodes, reading no data",
        "millrace data simulate run.toml --nodes 128 --ranks 8",
        "stream:simulate",
    ),
}


def main(argv: Sequence[str]) -> int:
    """Run a sub-command."""
    return run_subcommand("data", SUBCOMMANDS, argv)


def verify(argv: Sequence[str]) -> int:
    """Compare every shard and index file with what the manifest says; 1 where one differs."""
    parser = Parser(
        prog="millrace data verify",
        description="Hash every shard and every index file of a manifest again, of its held-out part too.",
        epilog="example: millrace data verify data/web",
    )
    parser.add_argument("folder", help="folder of the manifest")
    folder = parser.parse_args(list(argv)).folder
    from millrace.data.verify import verify as check
    from millrace.launch.prepare import Shown

    report = check(folder, Shown())
    done = f"{report.shards:,} shards ({fmt_size(report.bytes)}) and {report.index_files:,} index files"
    if not report.problems:
        print(f"{folder}: {done} are what was indexed")
        return 0
    rows = [(problem.url, problem.what) for problem in report.problems]
    show_table(f"{folder}: {len(rows):,} of {done} are not what was indexed", ["file", "what"], rows)
    return 1
