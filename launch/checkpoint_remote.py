"""`millrace checkpoint download`, and `ls` of an object store."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.core.console import say, show_table
from millrace.core.errors import UserError
from millrace.core.units import fmt_size
from millrace.launch.arguments import Parser
from millrace.launch.checkpoint import SUBCOMMANDS

if TYPE_CHECKING:
    from millrace.data.stores.folder import RemoteFolder


def ls_remote(url: str) -> int:
    """Step, size, ranks and stage of every checkpoint in a store; nothing is verified."""
    from millrace.data.stores.folder import RemoteFolder
    from millrace.engine.checkpoint.download import open_remote, remote_names

    folder = RemoteFolder(url)
    rows: list[tuple[str, ...]] = []
    for name in remote_names(folder):
        try:
            found = open_remote(folder, name)
        except UserError:
            rows.append((name, "damaged: its manifest is none", "", ""))
            continue
        if found is None:
            rows.append((name, "not complete", "", ""))
            continue
        size = fmt_size(sum(entry["size"] for entry in found.manifest["files"].values()))
        kind = f"{found.manifest.get('world')} × ZeRO {found.manifest.get('zero_stage')}"
        rows.append((name, f"{int(name[5:]):,}", size, kind))
    show_table(f"{url}: {len(rows)} checkpoints", ["checkpoint", "step", "size", "ranks"], rows)
    return 0


def download(argv: Sequence[str]) -> int:
    """Copy a checkpoint out of a store into a run's folder of checkpoints."""
    example = f"example: {SUBCOMMANDS['download'][1]}"
    parser = Parser(
        prog="millrace checkpoint download", description="Copy a checkpoint out of a store.", epilog=example
    )
    parser.add_argument("url", help="what checkpoint.upload said, for the newest that is complete; or URL/step-N")
    parser.add_argument("folder", type=Path, help="where step-N goes, such as runs/tiny/checkpoints")
    options = parser.parse_args(list(argv))
    from millrace.core.lease import acquire
    from millrace.data.stores.folder import RemoteFolder
    from millrace.engine.checkpoint.download import STEP, Remote, download, newest_remote, open_remote

    prefix, _, last = options.url.rstrip("/").rpartition("/")
    step = last if STEP.fullmatch(last) else ""
    source = RemoteFolder(prefix if step else options.url)
    found: Remote | None = open_remote(source, step) if step else newest_remote(source)
    if found is None:
        raise UserError(f"{options.url} holds no complete checkpoint: `millrace checkpoint ls {source.url}` lists them")
    run = options.folder.parent if options.folder.name == "checkpoints" else None
    with acquire(run) if run else contextlib.nullcontext():
        if run:
            _name_run(run, source)
        say(f"written: {download(found, options.folder)}")
    return 0


def _name_run(path: Path, source: RemoteFolder) -> None:
    """A run directory without a name becomes that of the run in the store, which goes on in it.

    Raises:
        UserError: it holds another run.
    """
    from millrace.core.rundir import RunDir
    from millrace.engine.checkpoint.download import remote_identity

    run, named = RunDir(path), remote_identity(source)
    if named is None:
        return
    if not run.identity.exists():
        run.create(named["fingerprint"], named["parent"], named["id"])
    elif (here := json.loads(run.identity.read_text())["id"]) != named["id"]:
        raise UserError(f"{path} holds another run ({here}) than {source.url} ({named['id']}); give another folder")
