"""`millrace checkpoint SUBCOMMAND …`: look at a run's checkpoints, verify, fetch and remove them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millrace.core.console import say, show_table
from millrace.core.errors import UserError
from millrace.core.units import fmt_count, fmt_size
from millrace.launch.arguments import Parser, run_subcommand

if TYPE_CHECKING:
    from millrace.engine.checkpoint.read import Checkpoint

# name -> (what it does, an example, where it is)
SUBCOMMANDS = {
    "ls": ("list the checkpoints of a run, or in a store", "millrace checkpoint ls runs/tiny", "checkpoint:ls"),
    "verify": ("hash every file again", "millrace checkpoint verify runs/tiny", "checkpoint:verify"),
    "inspect": (
        "what a checkpoint holds",
        "millrace checkpoint inspect runs/tiny/checkpoints/step-00000100",
        "checkpoint:inspect",
    ),
    "prune": (
        "remove all but the newest that verify",
        "millrace checkpoint prune runs/tiny --keep 2",
        "checkpoint:prune",
    ),
    "download": (
        "copy one out of an object store, verified",
        "millrace checkpoint download s3://bucket/tiny runs/tiny/checkpoints",
        "checkpoint_remote:download",
    ),
    "import": (
        "pickled weights of others into safetensors (--trust-pickle)",
        "millrace checkpoint import downloaded/model.pt weights/ --trust-pickle",
        "import_weights:main",
    ),
    "convert": (
        "write a folder that transformers loads (as millrace export)",
        "millrace checkpoint convert runs/tiny exported/",
        "export:main",
    ),
}


def main(argv: Sequence[str]) -> int:
    """Run a sub-command."""
    return run_subcommand("checkpoint", SUBCOMMANDS, argv)


def _parser(name: str, what: str) -> Parser:
    return Parser(prog=f"millrace checkpoint {name}", description=what, epilog=f"example: {SUBCOMMANDS[name][1]}")


def _steps(run: str) -> list[Path]:
    """`step-N` folders of a run, newest first; or the one that is named itself."""
    from millrace.engine.checkpoint.read import list_checkpoints

    path = Path(run)
    if (path / "MANIFEST.json").is_file():
        return [path]
    if not (path / "checkpoints").is_dir():
        raise UserError(f"{run} is neither a run directory nor one of its checkpoints/step-N folders")
    return list_checkpoints(path / "checkpoints")


def _size(checkpoint: Checkpoint) -> int:
    return sum(entry["size"] for entry in checkpoint.manifest["files"].values())


def ls(argv: Sequence[str]) -> int:
    """Step, time, size, ranks, stage and tokens of every checkpoint; nothing is verified."""
    parser = _parser("ls", "List the checkpoints of a run, newest first; nothing is verified.")
    parser.add_argument("run", help="run directory, or the value of checkpoint.upload, such as s3://BUCKET/PREFIX")
    run = parser.parse_args(list(argv)).run
    if "://" in run:
        from millrace.launch.checkpoint_remote import ls_remote

        return ls_remote(run)
    from millrace.engine.checkpoint.read import Checkpoint

    rows: list[tuple[str, ...]] = []
    for path in _steps(run):
        try:
            found = Checkpoint(path)
        except UserError as problem:
            rows.append((path.name, f"damaged: {problem}", "", "", "", ""))
            continue
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime((path / "MANIFEST.json").stat().st_mtime))
        kind = f"{found.manifest['world']} × ZeRO {found.manifest['zero_stage']}"
        tokens = fmt_count(found.json("trainer")["tokens"])
        rows.append((path.name, written, f"{found.step:,}", tokens, fmt_size(_size(found)), kind))
    show_table(f"{run}: {len(rows)} checkpoints", ["checkpoint", "written", "step", "tokens", "size", "ranks"], rows)
    return 0


def verify(argv: Sequence[str]) -> int:
    """Compare every file with its SHA-256; 1 where one differs."""
    parser = _parser("verify", "Hash every file of the checkpoints of a run, or of one step-N folder, again.")
    parser.add_argument("run", help="run directory, or one of its checkpoints/step-N folders")
    run = parser.parse_args(list(argv)).run
    from millrace.engine.checkpoint.read import verdict

    bad = 0
    for path in _steps(run):
        problem = verdict(path)
        bad += bool(problem)
        print(f"{path}: {problem or 'good'}")
    return int(bad > 0)


def inspect(argv: Sequence[str]) -> int:
    """What a checkpoint holds, from its manifest; the newest of a run."""
    parser = _parser("inspect", "What a checkpoint holds, from its manifest.")
    parser.add_argument("run", help="step-N folder, or a run directory for its newest")
    run = parser.parse_args(list(argv)).run
    from millrace.engine.checkpoint.read import Checkpoint

    paths = _steps(run)
    if not paths:
        raise UserError(f"{run} has no checkpoint yet")
    found = Checkpoint(paths[0])
    manifest, trainer = found.manifest, found.json("trainer")
    show_table(str(found.path), ["", ""], _facts(found, trainer))
    shapes = [(name, " × ".join(map(str, shape)) or "scalar") for name, shape in manifest["params"].items()]
    show_table("parameters", ["name", "shape"], shapes)
    return 0


def _facts(found: Checkpoint, trainer: dict[str, Any]) -> list[tuple[str, str]]:
    from math import prod

    manifest, loader = found.manifest, trainer["loader"]
    count = sum(prod(shape) for shape in manifest["params"].values())
    return [
        ("step, tokens", f"{found.step:,}, {fmt_count(trainer['tokens'])}"),
        ("run", trainer.get("run_id", "?")),
        ("trained parameters", f"{fmt_count(count)} in {len(manifest['params'])} tensors"),
        ("states", ", ".join(manifest["states"])),
        ("optimiser steps", f"{manifest['optimizer_steps']:,}"),
        ("written by", f"{manifest['world']} ranks at ZeRO {manifest['zero_stage']}"),
        ("size", f"{fmt_size(_size(found))} in {len(manifest['files'])} files"),
        ("place in the data", f"window {loader['window']}, row {loader['packs_done']}"),
        ("format", str(manifest["format"])),
    ]


def prune(argv: Sequence[str]) -> int:
    """Remove all but the newest checkpoints that verify."""
    parser = _parser("prune", "Remove all but the newest checkpoints that verify; refused while the run is trained.")
    parser.add_argument("run", help="run directory")
    parser.add_argument("--keep", type=int, required=True, help="how many stay, at least 1")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    options = parser.parse_args(list(argv))
    if options.keep < 1:
        raise UserError(f"--keep = {options.keep}: at least 1 must stay; remove the run directory to remove all")
    from millrace.core.lease import acquire
    from millrace.engine.checkpoint.read import verdict
    from millrace.engine.checkpoint.write import remove

    if not (Path(options.run) / "checkpoints").is_dir():
        raise UserError(f"{options.run} is not a run directory: it has no checkpoints/")
    with acquire(Path(options.run)):
        steps = _steps(options.run)
        good: list[Path] = []
        for path in steps:
            if len(good) < options.keep and not verdict(path):
                good.append(path)
        if not good and steps:
            raise UserError(f"none of the {len(steps)} checkpoints of {options.run} verifies; nothing was removed")
        for path in [path for path in steps if path not in good]:
            say(f"{'would remove' if options.dry_run else 'removing'} {path}")
            if not options.dry_run:
                remove(path)
    return 0
