"""`millrace data curate`: a corpus without duplicates, junk and evaluation sets, and a report of what was removed.

Passes: note every document's place and hash; judge what is no exact duplicate; find near duplicates among what has the
quality; write. Interruptible at any point: `.work` holds what is done, and `report.json` appears last. The same command
continues, and does nothing when all is done.

Memory: a worker holds a batch of documents (of Parquet a row group), up to 20 times a very large document, and some 70
bytes for each document of its unit; between the passes about 100 bytes a document, and 200 for each that has near
duplicates. Disk: 2 kB a document, and what is kept.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.core.errors import UserError
from millrace.core.rundir import write_atomic
from millrace.data.curate.config import CurateConfig
from millrace.data.dataset_files import DATASET
from millrace.data.inputs import InputFile, Progress, resolve


@dataclass(frozen=True)
class Result:
    """Where the kept text is, and the report."""

    text: str
    report: dict[str, Any]
    already_done: bool


def _no_progress(what: str, done: int, total: int) -> None:
    pass


def curate(config: CurateConfig, progress: Progress = _no_progress) -> Result:
    """Write a curated copy, continuing what an interrupted call with the same options left.

    A finished folder is never changed: the same call returns its report, any other is refused.

    Raises:
        UserError: inputs that are missing, empty, undecodable or changed; evaluation files without text; a folder that
            holds something else; too little space; datatrove not installed.
    """
    files, evaluation = _files(config)
    out = Path(config.out).absolute()
    claim = {
        "options": config.options(),
        "files": [file.key() for file in files],
        "eval": [file.key() for file in evaluation],
    }
    if (out / "report.json").exists():
        return _finished(out, claim)
    _claim(out, claim)
    if importlib.util.find_spec("datatrove") is None:
        raise UserError("curation needs datatrove, which is not installed: pip install millrace[curate]")
    from millrace.data.curate.steps import run_steps

    try:
        run_steps(config, files, evaluation, out / ".work", progress)
        return _commit(config, out, claim)
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror or error}; free space there and run the same command again "
            "to continue"
        ) from None


def _files(config: CurateConfig) -> tuple[list[InputFile], list[InputFile]]:
    if not config.inputs:
        raise UserError("nothing to curate: name at least one file, folder or glob")
    if not config.out:
        raise UserError("no folder to write to: set out, such as --out data/curated")
    for name in config.inputs:
        if name.startswith(DATASET):
            raise UserError(f"'{name}' is a data set of the hub; curate reads files: save it as Parquet first")
    out = Path(config.out)
    return resolve(config.inputs, config.kind, out), resolve(config.eval, "auto", out)


def _claim(out: Path, claim: dict[str, Any]) -> None:
    """Take `out` for this work, or continue it."""
    path = out / ".work" / "claim.json"
    if path.exists():
        old = json.loads(path.read_text())
        if any(path.parent.glob("noted/*.npy")):
            # What is done holds no undecodable document where those stop the work, so they may be skipped from here on.
            was = old | {"options": old["options"] | {"on_bad": claim["options"]["on_bad"]}}
            skips = claim["options"]["on_bad"] == "skip"
            _same(out, was if skips else old, claim, "is half curated", f"finish that, or delete {out}")
    else:
        there = sorted(p.name for p in out.iterdir() if p.name != ".work") if out.is_dir() else []
        if there:
            raise UserError(f"{out} holds '{there[0]}' that no `curate` left here; name a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(claim))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None


def _same(out: Path, old: dict[str, Any], new: dict[str, Any], state: str, mend: str) -> None:
    for key, value in new["options"].items():
        if old["options"].get(key) != value:
            was = old["options"].get(key)
            raise UserError(f"{out} {state} with other options ({key} was {was!r} and is now {value!r}); {mend}")
    for kind in ("files", "eval"):
        before, now = ({file[0]: file for file in claim[kind]} for claim in (old, new))
        changed = [name for name in (*before, *now) if before.get(name) != now.get(name)]
        if changed:
            what = "was added" if changed[0] not in before else "is gone" if changed[0] not in now else "changed"
            raise UserError(f"{out} {state}, but {changed[0]} {what} since; {mend}")


def _finished(out: Path, claim: dict[str, Any]) -> Result:
    report = json.loads((out / "report.json").read_text())
    _same(out, report["claim"], claim, "was curated", "name a new folder")
    shutil.rmtree(out / ".work", ignore_errors=True)
    return Result(str(out / "text"), report, already_done=True)


def _commit(config: CurateConfig, out: Path, claim: dict[str, Any]) -> Result:
    """Make the result visible: folders by renaming, the report last."""
    from millrace.data.curate.page import page
    from millrace.data.curate.report import make_report

    work = out / ".work"
    report = make_report(config, work) | {"claim": claim}
    for folder in ("text", "removed", "flagged"):
        made = work / "out" / folder
        if not (out / folder).exists() and (folder == "text" or any(made.iterdir())):
            os.replace(made, out / folder)
    write_atomic(out / "report.html", page(out.name, report))
    write_atomic(out / "report.json", json.dumps(report, indent=1))
    shutil.rmtree(work)
    return Result(str(out / "text"), report, already_done=False)
