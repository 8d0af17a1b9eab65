"""What a preparation left beside its manifest: the options, the files and how far they went; and what may be added.

`prepared.json` follows `manifest.json` by a rename. Between the two it lies in `.work/`, and is found there by the
fingerprint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from millrace.core.errors import UserError
from millrace.core.rundir import fsync_folder, write_atomic
from millrace.data.index import index_file
from millrace.data.inputs import InputFile, sha256_of
from millrace.data.manifest import commit_manifest
from millrace.data.stores.base import open_blob

_FILE = "prepared.json"
_NEW = "; prepare into a new folder"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A finished state of a folder."""

    options: dict[str, Any]
    files: list[list[Any]]  # [URL, size, version, SHA-256] of each
    units: int  # units of work done, over all calls
    shards: dict[str, int]  # of each part
    index: dict[str, list[str]]  # index files of each part
    summary: dict[str, Any]

    @classmethod
    def load(cls, out: Path) -> Prepared | None:
        """The state that `out/manifest.json` is in; None where nothing was finished.

        Raises:
            UserError: another manifest, or one that cannot be read.
        """
        try:
            fingerprint = json.loads((out / "manifest.json").read_text())["fingerprint"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{out / 'manifest.json'} is not a readable manifest: {error}{_NEW}") from None
        for path in (out / _FILE, out / ".work" / _FILE):
            found = json.loads(path.read_text()) if path.exists() else None
            if found and found["summary"]["fingerprint"] == fingerprint:
                _move(path, out)
                return cls(**found)
        raise UserError(f"{out} holds a manifest that `prepare` did not write; name a new folder")

    def added(self, files: Sequence[InputFile], out: Path) -> list[InputFile]:
        """Those of `files` that are new.

        Raises:
            UserError: one of the others was changed or is gone.
        """
        new, known = [], {url: (size, version, sha) for url, size, version, sha in self.files}
        for file in files:
            if file.url not in known:
                new.append(file)
                continue
            size, version, sha = known.pop(file.url)
            if file.size != size or (file.version != version and _hash(file.url) != sha):
                raise UserError(f"{file.url} changed after {out} was prepared{_NEW}, or put the old file back")
        if known:
            raise UserError(f"{next(iter(known))} is gone since {out} was prepared{_NEW}, or put it back")
        return new

    def commit(self, out: Path, made: Mapping[str, Mapping[str, Any]]) -> None:
        """Make the manifests in `made` visible (by part, the training one last), and this state with them."""
        write_atomic(out / ".work" / _FILE, json.dumps(asdict(self), indent=1))
        if "heldout" in made:
            commit_manifest(out / "heldout", made["heldout"])
        commit_manifest(out, made["train"])
        _move(out / ".work" / _FILE, out)


def _hash(url: str) -> str:
    with open_blob(url) as blob:
        return sha256_of(blob)


def _move(path: Path, out: Path) -> None:
    if path != out / _FILE:
        os.replace(path, out / _FILE)
        fsync_folder(out)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What forbids to continue with `new` options what was begun with `old` ones; empty where nothing does.

    Inputs may be added behind the old ones, and bad samples may now be skipped: what is done has none.
    """
    allowed = dict(old)
    if new["on_bad"] == "skip":
        allowed["on_bad"] = "skip"
    if new["inputs"][: len(old["inputs"])] == old["inputs"]:
        allowed["inputs"] = new["inputs"]
    changed = [key for key in {**new, **old} if allowed.get(key) != new.get(key)]
    return "; ".join(f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in changed)


def claim(out: Path, options: Mapping[str, Any]) -> None:
    """Take `out` for a first preparation, or continue it; where no unit is finished yet, other options start it anew.

    Raises:
        UserError: the folder holds something else, or work with other options.
    """
    path = out / ".work" / "options.json"
    if path.exists():
        changed = difference(json.loads(path.read_text()), options)
        if changed:
            if any(path.parent.glob("[0-9]*.json")) or any(codes_folder(out).glob("*.json")):
                raise UserError(
                    f"{out} is half prepared with other options ({changed}); finish with the old "
                    f"ones, name another folder, or delete {out}"
                )
            for begun in (out / "raw", path.parent):
                shutil.rmtree(begun, ignore_errors=True)
    else:
        # Only a folder of its own: files of others beside a manifest would one day be taken for data.
        there = sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) if out.is_dir() else []
        if there:
            raise UserError(f"{out} holds '{there[0]}' that no `prepare` left here; name a new folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(options))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from None


def codes_folder(out: Path) -> Path:
    """Where the shards of encoded media lie."""
    return out / "raw" / "codes"


def index_files(made: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Names of the index files of each part."""
    return {part: [index_file(i, chunk) for i, chunk in enumerate(record["index"])] for part, record in made.items()}


def tidy(out: Path, made: Mapping[str, Mapping[str, Any]], before: Prepared | None) -> None:
    """Remove what neither the manifests in `made` nor the ones `before` refer to: interrupted and replaced files."""
    for part, folder in (("train", out), ("heldout", out / "heldout")):
        if part not in made:
            continue
        named = {f"index/{name}" for name in index_files(made)[part]} | {s["url"] for s in made[part]["shards"]}
        named |= {f"index/{name}" for name in before.index.get(part, [])} if before else set()
        for path in [*(folder / "index").glob("*"), *(folder / "shards").glob("*")]:
            if f"{path.parent.name}/{path.name}" not in named:
                path.unlink()
