"""`millrace prepare` and `millrace data index`: files or a data set into a manifest."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from millrace.core.config import Source, build
from millrace.core.console import get_console, say, show_table
from millrace.core.errors import UserError
from millrace.core.units import fmt_count, fmt_size
from millrace.launch.arguments import Parser

if TYPE_CHECKING:
    from millrace.data.prepare import PrepareConfig, Summary


def main(argv: Sequence[str]) -> int:
    """Prepare, showing progress on a terminal; prints a table of what was counted."""
    return _prepare(_given(_parser(), argv))


def index(argv: Sequence[str]) -> int:
    """Index in place; token costs are counted with the tokenizer that is named, if one is."""
    given = _given(_index_parser(), argv)
    of_text = "text" in given or not given.keys() & {"image", "audio", "tokens"}
    return _prepare(given | {"count_tokens": "tokenizer" in given or not of_text})


def _prepare(given: dict[str, Any]) -> int:
    from millrace.data.prepare import PrepareConfig, prepare

    codecs = _codecs(given.pop("codec", ()))
    config = build(PrepareConfig, given, Source("the command line"))
    launched = "WORLD_SIZE" in os.environ or "SLURM_STEP_ID" in os.environ
    summary = _on_ranks(config, codecs) if codecs or launched else prepare(config, Shown())
    if summary is None:
        return 0
    rows = [
        (
            part,
            s["name"],
            fmt_count(s["documents"]),
            fmt_size(s["bytes"]),
            fmt_count(s["tokens"]) if s["tokens"] else "–",
        )
        for part, sources in (("train", summary.train), ("held out", summary.heldout))
        for s in sources
        if s["documents"] or part == "train"
    ]
    done = "was already prepared" if summary.already_done else "is ready"
    if summary.added_files:
        done = f"has grown by {summary.added_files:,} file{'s' * (summary.added_files > 1)}"
    show_table(f"{summary.out} {done}", ["part", "source", "samples", "text", "tokens"], rows)
    for skipped in summary.skipped:
        say(f"skipped: {skipped}")
    print(summary.out)
    return 0


def _codecs(given: Sequence[str]) -> dict[str, str]:
    """Where the codec of each role is."""
    found: dict[str, str] = {}
    for text in given:
        role, _, path = text.partition("=")
        if not path or role in found:
            raise UserError(f"--codec {text}: write ROLE=WHERE once for each role, such as --codec image=runs/codec")
        found[role] = path
    return found


def _on_ranks(config: PrepareConfig, codecs: Mapping[str, str]) -> Summary | None:
    """Prepare on all ranks that a launcher started, if it did, with codecs or without; None on all but the first."""
    from millrace.data.prepare import prepare
    from millrace.engine.distributed import join_group, leave_world, world_size
    from millrace.eval.coder import open_coder

    world = join_group() if world_size() > 1 else None
    main = world is None or world.main
    try:
        coders = {role: open_coder(role, path, world.device if world else None) for role, path in codecs.items()}
        summary = prepare(config, Shown() if main else _silent, coders, world)
    finally:
        leave_world()
    return summary if main else None


def _silent(what: str, done: int, total: int) -> None:
    pass


class Shown:
    """One line that is rewritten on a terminal; elsewhere a line at the start of each phase."""

    def __init__(self) -> None:
        self.phase = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes (0: not known) are done."""
        console = get_console()
        if console.is_terminal:
            share = f" {100 * done / total:5.1f}% of {fmt_size(total)}" if total else f" {fmt_count(done)}"
            console.print(f"\r{what}{share}  ", end="\n" if total and done >= total else "", markup=False)
        elif what != self.phase:
            say(f"{what} …")
        self.phase = what


def _given(parser: Parser, argv: Sequence[str]) -> dict[str, Any]:
    """Options that were given, as a tree: --image-patch is costs.image.patch."""
    given = {k: v for k, v in vars(parser.parse_intermixed_args(list(argv))).items() if v is not None}
    for role, name in _COSTS:
        if f"{role}_{name}" in given:
            given.setdefault("costs", {}).setdefault(role, {})[name] = given.pop(f"{role}_{name}")
    return given


_COSTS = (("image", "patch"), ("image", "most"), ("audio", "hop_ms"))


def _parser() -> Parser:
    parser = Parser(
        prog="millrace prepare",
        description="Turn files, folders, globs, URLs or data sets into a manifest: shards, token counts, a tokenizer. "
        "Interrupt it at any time; the same command continues, and appends files that were added since.",
        epilog="example: millrace prepare books/ --out data/books --vocab-size 8k --heldout 0.05",
    )
    _add_inputs(parser)
    add: Any = parser.add_argument
    add(
        "--codec",
        action="append",
        metavar="ROLE=WHERE",
        help="encode images or sounds with a codec: its run, step-N folder or export, as in image=runs/codec. Under "
        "torchrun, accelerate launch or srun all ranks encode",
    )
    add("--tokenizer", help="tokenizer folder, file or hub name (default: train a byte-level BPE)")
    add("--vocab-size", help="vocabulary of the tokenizer to train (default: 8192)")
    add("--train-bytes", help="text that the tokenizer is trained on, at most (default: 64 MiB)")
    add("--tokenize", action="store_const", const=True, help="write tokenised Parquet shards")
    add("--shard-size", help="size of shards that are written (default: 64 MiB)")
    return parser


def _index_parser() -> Parser:
    parser = Parser(
        prog="millrace data index",
        description="Write a manifest of files, folders, globs or URLs that stay where they are. Interrupt it at any "
        "time; the same command continues, and appends files that were added since.",
        epilog="example: millrace data index photos=s3://bucket/photos/ --image jpg --text txt --out data/photos",
    )
    _add_inputs(parser)
    parser.add_argument("--tokenizer", help="folder, file or hub name of what counts tokens (default: not counted)")
    return parser


def _add_inputs(parser: Parser) -> None:
    add: Any = parser.add_argument
    add("inputs", nargs="+", help="files, folders, globs, URLs or datasets:NAME[:CONFIG[:SPLIT]]; NAME=WHERE names one")
    add("--out", required=True, help="folder to write")
    add("--kind", help="format of all inputs (default: auto, by suffix)")
    add("--text", help="column or field that holds the text (default: text, if no other role is named)")
    add("--image", help="column, field or suffix of the image")
    add("--audio", help="column, field or suffix of the sound")
    add("--tokens", help="column of token ids, where the inputs are tokenised already")
    add("--image-patch", type=int, help="pixels on the side of a patch, one position each (default: 16)")
    add("--image-most", type=int, help="positions of an image, at most; larger ones are scaled down (default: 1024)")
    add("--audio-hop-ms", type=int, help="milliseconds of sound that make a position (default: 20)")
    add("--heldout", type=float, help="share of the samples to hold out, such as 0.05")
    add("--heldout-by", help="hash (of the sample) or nth")
    add("--on-bad", help="stop (default) or skip, at a sample that cannot be read")
