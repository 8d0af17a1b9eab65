"""Checkpoints out of an object store, where `upload` put them; what lies there is not trusted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from millrace.core.bounded import bounded
from millrace.core.console import say, warn
from millrace.core.errors import UserError
from millrace.core.rundir import RunDir, fsync_folder
from millrace.data.stores.base import StoreError
from millrace.data.stores.folder import RemoteFolder
from millrace.engine.checkpoint.read import list_checkpoints
from millrace.engine.checkpoint.upload import IDENTITY, MANIFEST, MOST

STEP = re.compile(r"step-\d{8,18}")
_PART, _AT_ONCE = 2**24, 8  # bytes of a read, and files
_ASK_SECONDS = 20.0  # of a start, for what a store holds


@dataclass(frozen=True)
class Remote:
    """A complete checkpoint in a store: `name` is `step-N`; the manifest as it lies there, and its files."""

    folder: RemoteFolder
    name: str
    raw: bytes
    manifest: dict[str, Any]


def remote_names(folder: RemoteFolder) -> list[str]:
    """`step-N` of all checkpoints in a store, also of those that are not complete, newest first.

    Raises:
        StoreError: the store does not answer, or refuses to.
    """
    return sorted(filter(STEP.fullmatch, folder.folders()), key=lambda name: int(name[5:]), reverse=True)


def open_remote(folder: RemoteFolder, name: str) -> Remote | None:
    """The checkpoint `step-N` of a store; None where it is not complete.

    Raises:
        StoreError: the store does not answer, or refuses to.
        UserError: its manifest is none, or names files outside of it.
    """
    raw = folder.get(f"{name}/{MANIFEST}", MOST)
    if raw is None:
        return None
    try:
        manifest = json.loads(raw)
        files = manifest["files"].items()
        good = manifest["step"] == int(name[5:]) and all(_is_file(file, entry) for file, entry in files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise UserError(f"{folder.url}/{name}/{MANIFEST} is no manifest of a checkpoint of that step; it is not used")
    return Remote(folder, name, raw, manifest)


def _is_file(name: str, entry: dict[str, Any]) -> bool:
    """Whether this is an entry of a manifest, for a file inside of the checkpoint."""
    path = PurePosixPath(name)
    inside = str(path) == name and not path.is_absolute() and ".." not in path.parts and name.isprintable()
    size = entry["size"]
    sound = type(size) is int and size >= 0 and bool(re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]))
    return inside and sound and name not in (".", MANIFEST)


def newest_remote(folder: RemoteFolder) -> Remote | None:
    """The newest complete checkpoint of a store; raises as `open_remote`."""
    return next((found for name in remote_names(folder) if (found := open_remote(folder, name))), None)


def download(found: Remote, target: Path) -> Path:
    """Copy a checkpoint into the folder `target`, where it becomes visible when all its hashes agree; returns its path.

    Raises:
        StoreError: the store stopped answering.
        UserError: a file is not what the manifest says; it is there already; or `target` cannot be written.
    """
    final, temporary = target / found.name, target / f"{found.name}.tmp-download-{os.getpid()}"
    if final.exists():
        raise UserError(f"{final} is there already; remove it first, or give another folder")
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        temporary.mkdir(parents=True)
        for _ in pool.map(lambda item: _fetch(found, temporary, *item), found.manifest["files"].items()):
            pass
        _write(temporary / MANIFEST, found.raw)
        for folder in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
            fsync_folder(folder)
        os.rename(temporary, final)
        fsync_folder(target)
    except StoreError:
        raise
    except OSError as error:
        raise UserError(f"cannot write {final}: {error}") from None
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _fetch(found: Remote, temporary: Path, name: str, entry: dict[str, Any]) -> None:
    path, url = temporary / name, f"{found.folder.url}/{found.name}/{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    sums = hashlib.sha256()
    with found.folder.blob(f"{found.name}/{name}") as blob, open(path, "xb") as file:
        if blob.size != entry["size"]:
            raise UserError(f"{url} has {blob.size} bytes, {entry['size']} were written; take another step")
        for start in range(0, blob.size, _PART):
            data = blob.read(start, min(_PART, blob.size - start))
            sums.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if sums.hexdigest() != entry["sha256"]:
        raise UserError(f"{url} was altered: its SHA-256 differs from the manifest's; take another step")


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def remote_identity(folder: RemoteFolder) -> dict[str, Any] | None:
    """Whose checkpoints a store holds: `id`, `name`, `fingerprint` and `parent` of the run; None where it does not say.

    Raises:
        StoreError: the store does not answer, or refuses to.
        UserError: it is not what `upload` writes.
    """
    raw = folder.get(IDENTITY, MOST)
    if raw is None:
        return None
    try:
        told = json.loads(raw)
        kept = {
            "id": told["id"],
            "name": told["name"],
            "fingerprint": told["fingerprint"],
            "parent": told.get("parent"),
        }
        good = re.fullmatch(r"[0-9a-f]{12}", kept["id"]) and isinstance(kept["fingerprint"], dict)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = None
    if not good:
        raise UserError(f"{folder.url}/{IDENTITY} does not name a run")
    return kept


def restore(url: str, rundir: RunDir, fingerprint: dict[str, Any]) -> None:
    """Where a run has no checkpoint here but its store has some: download the newest, so that the run goes on from it.

    A store that does not answer within some seconds is told, and the run starts from step 0: as another run, for the
    store's checkpoints, which it will not touch.

    Raises:
        UserError: the store's are of another run, or cannot be taken; the message says what can be done.
    """
    if not url or list_checkpoints(rundir.checkpoints):
        return
    folder = RemoteFolder(url)
    way = (
        f"To go on from one of them: millrace checkpoint download {url} {rundir.checkpoints}; to start over: set "
        "checkpoint.upload to another prefix. This run does not start over in silence"
    )
    try:
        found, identity = bounded(lambda: (newest_remote(folder), remote_identity(folder)), _ASK_SECONDS)
        if found is None:
            return
        if other := _differs(identity, rundir, json.loads(json.dumps(fingerprint))):
            raise UserError(f"{rundir.path} has no checkpoint, and {url} holds some, but of {other}")
    except (StoreError, TimeoutError) as error:
        warn(f"{url} cannot be asked whether it holds checkpoints of this run ({error}): it starts from step 0")
        return
    except UserError as error:
        raise UserError(f"{error}. {way}") from None
    assert identity is not None
    say(f"{rundir.path} has no checkpoint: {found.name} of this run is downloaded from {url}")
    rundir.create(fingerprint, identity["parent"], identity["id"])
    try:
        download(found, rundir.checkpoints)
    except (StoreError, UserError) as error:
        raise UserError(f"{error}. {way}") from None


def _differs(other: dict[str, Any] | None, rundir: RunDir, mine: dict[str, Any]) -> str:
    """Whose checkpoints a store holds where they are not this run's; empty where they are."""
    if other is None:
        return "an unknown run"
    theirs = other["fingerprint"]
    changed = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
    named = f"run {other['name']!r} ({other['id']})"
    if changed:
        return f"{named}, which differs in {', '.join(changed)}"
    return "" if other["name"] == rundir.path.name else named
