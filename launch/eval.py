"""`millrace eval`: bits per byte and tasks of any checkpoint, recall of a contrastive one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from millrace.launch.arguments import Parser

_FORMATS = """task files are JSON lines, of these kinds (write KIND=FILE where the fields do not tell):
  multiple_choice  {"question" or "context": "…", "choices": ["…", "…"], "answer": 0}
  text             {"text": "…"}, its perplexity
  last_word        {"text": "…"}, whether its last word is the likeliest
folders and files of lm-eval's own YAML tasks work too, with local data files; nothing is downloaded.

example: millrace eval runs/tiny --text books/held_out.txt --tasks tasks/arc_easy.jsonl --out result.json"""


def main(argv: Sequence[str]) -> int:
    """Show tables on stderr, write the JSON result and print its path on stdout."""
    parser = Parser(
        prog="millrace eval",
        description="Evaluate a run directory (its newest good checkpoint), a step-N folder, or a Hugging Face folder "
        "or hub name.",
        epilog=_FORMATS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="what to evaluate")
    parser.add_argument(
        "--text", nargs="+", action="extend", default=[], metavar="PATH",
        help="bits per byte of text, JSONL or Parquet files, folders of them, or manifests",
    )  # fmt: skip
    parser.add_argument(
        "--probe", nargs="+", default=[], metavar="MANIFEST",
        help="what features of an image encoder are worth, on labelled images with a held-out part (or a second "
        "manifest): nearest neighbours and a linear probe",
    )  # fmt: skip
    parser.add_argument("--label", default="label", metavar="COLUMN", help="of the labels of --probe (label)")
    parser.add_argument("--untrained", action="store_true", help="of --probe: with random weights, to compare with")
    parser.add_argument("--tasks", nargs="+", action="extend", default=[], metavar="PATH", help="task files or folders")
    parser.add_argument(
        "--retrieval",
        metavar="MANIFEST",
        help="recall of a contrastive run among 100 samples of a manifest",
    )
    parser.add_argument("--out", metavar="FILE.json", help="result (default: eval-NAME.json here)")
    parser.add_argument("--limit", type=int, metavar="N", help="first N documents of each text and task")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="rows computed at once (8)")
    parser.add_argument("--context", type=int, metavar="N", help="tokens seen at once (default: as trained)")
    parser.add_argument(
        "--stride", type=int, metavar="N",
        help="move a window of the whole context by N tokens, instead of cutting long documents as training does",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    options = vars(parser.parse_args(list(argv)))
    from millrace.eval.evaluate import Request, evaluate, show_result, write_result

    out = options.pop("out")
    result = evaluate(Request(**options))
    show_result(result)
    path = Path(out or f"eval-{_name(options['source'])}.json")
    write_result(result, path)
    print(path)
    return 0


def _name(source: str) -> str:
    """`runs/tiny` → `tiny`; `runs/tiny/checkpoints/step-00000100` → `tiny-step-00000100`."""
    path = Path(source).resolve()
    return f"{path.parents[1].name}-{path.name}" if path.name.startswith("step-") else path.name
