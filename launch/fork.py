"""`millrace fork RUN@STEP --name NEW`: a new run that goes on from a step of another."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from millrace.core.console import say
from millrace.core.errors import UserError
from millrace.core.rundir import RunDir, fsync_folder
from millrace.launch.arguments import Parser


def main(argv: Sequence[str]) -> int:
    """Make the run directory of a branch."""
    parser = Parser(
        prog="millrace fork",
        description="Start a branch of a run, such as a decay from the middle of its plateau: a new run directory that "
        "holds one of its checkpoints. What names a run (model, data, batch, seed, ...) stays; schedule, duration, "
        "learning rate and the rest may differ. The run that it comes from is recorded, and left as it is.",
        epilog="example: millrace fork runs/tiny@1000 --name decay, then "
        "millrace pretrain configs/tiny.toml run.name=decay train.duration='1200 steps'",
    )
    parser.add_argument("source", metavar="RUN[@STEP]", help="a run directory, and a step that it has a checkpoint of")
    parser.add_argument("--name", required=True, help="of the new run, beside the old one")
    options = parser.parse_args(list(argv))
    run, step = _parse(options.source)
    target = fork(run, step, options.name)
    where = f"run.dir={target.path.parent} run.name={options.name}"
    say(f"{target.path} goes on from {options.source}; {where} starts it")
    return 0


def fork(run: Path, step: int | None, name: str) -> RunDir:
    """Copy a verified checkpoint into a new run directory beside `run`; files are linked where that can be done.

    Raises:
        UserError: no such checkpoint, one that does not verify, or the name is taken.
    """
    from millrace.engine.checkpoint.read import open_verified
    from millrace.engine.checkpoint.write import step_name

    source, target = RunDir(run), RunDir(run.parent / name)
    if not source.identity.is_file():
        raise UserError(f"{run} is not a run directory: it has no {source.identity.name}")
    if Path(name).name != name or name in ("", ".", "..") or target.path.exists():
        raise UserError(f"--name {name}: {target.path} exists already" if target.path.exists() else f"--name {name!r}: "
                        "give a plain folder name")  # fmt: skip
    found = open_verified(run if step is None else source.checkpoints / step_name(step))
    known = json.loads(source.identity.read_text())
    parent = {"id": known["id"], "path": os.path.abspath(run), "step": found.step}
    # Made under another name first: a run directory is there as a whole, or not at all.
    unfinished = RunDir(run.parent / f".{name}.tmp-{os.getpid()}")
    try:
        shutil.copytree(found.path, unfinished.checkpoints / found.path.name, copy_function=_link)
        unfinished.create(known["fingerprint"], parent)
        os.rename(unfinished.path, target.path)
        fsync_folder(target.path.parent)
    except OSError as error:
        raise UserError(f"cannot make {target.path}: {error}") from None
    finally:
        shutil.rmtree(unfinished.path, ignore_errors=True)
    return target


def _parse(source: str) -> tuple[Path, int | None]:
    run, at, step = source.rpartition("@")
    if not at:
        return Path(source), None
    if not step.isdigit():
        raise UserError(f"'{source}': the step after @ is a number, as in runs/tiny@1000")
    return Path(run), int(step)


def _link(source: str, target: str) -> None:
    """Checkpoints are never written again, so that a second name is as good as a copy; other file systems need one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
