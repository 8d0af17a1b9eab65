"""The run directory: one run, its configuration, ledger, checkpoints and outcome."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from millrace.core.errors import UserError


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Make a rename in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_NAMED = 4  # differences that a message names


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class RunDir:
    """Paths of a run, and the claim that keeps two different runs out of one directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.identity = self.path / "run.json"
        self.config = self.path / "config.toml"
        self.ledger = self.path / "ledger.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report.html"
        self.outcome = self.path / "outcome.json"
        self.tokenizer = self.path / "tokenizer"

    def claim(self, fingerprint: dict[str, Any], min_free_bytes: int = 0) -> str:
        """Create the directory for a run with this `fingerprint`, or continue the same run; return its id.

        The fingerprint holds what may not change between starts of one run (model, data, batch, seed). A run that
        failed before it started (no ledger, no checkpoint) does not bind.

        Raises:
            UserError: the directory holds another run, cannot be written, or the disk is nearly full.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise UserError(f"cannot write the run directory {self.path}: {error}") from None
        if free < min_free_bytes:
            raise UserError(
                f"{self.path} has {free / 1e9:.2f} GB free and one checkpoint needs {min_free_bytes / 1e9:.2f} GB; "
                "free space or set run.dir to another disk"
            )
        self.check(fingerprint)
        if self.known() == json.loads(json.dumps(fingerprint)):
            return str(json.loads(self.identity.read_text())["id"])
        if self.started:
            raise UserError(f"{self.path} holds files of an unknown run; set run.name to a new name")
        return self.create(fingerprint)

    @property
    def parent(self) -> dict[str, Any] | None:
        """Of a branch: the id, path and step of the run that it comes from."""
        return json.loads(self.identity.read_text()).get("parent") if self.identity.exists() else None

    def known(self) -> dict[str, Any]:
        """The fingerprint of the run that is here; empty when there is none."""
        return dict(json.loads(self.identity.read_text())["fingerprint"]) if self.identity.exists() else {}

    def create(self, fingerprint: dict[str, Any], parent: dict[str, Any] | None = None, run_id: str = "") -> str:
        """Name the run that this directory holds from now on, a new one without `run_id`; returns its id."""
        run_id = run_id or uuid.uuid4().hex[:12]
        lineage = {"parent": parent} if parent else {}
        named = {"format": 1, "id": run_id, "fingerprint": fingerprint, **lineage}
        write_atomic(self.identity, json.dumps(named, indent=1))
        return run_id

    @property
    def started(self) -> bool:
        """Whether a run has left anything here that could be lost."""
        return self.ledger.exists() or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))

    def check(self, fingerprint: dict[str, Any]) -> None:
        """Refuse a directory that holds another run; reads only.

        Raises:
            UserError: the directory holds another run.
        """
        old, new = self.known(), json.loads(json.dumps(fingerprint))
        changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        if old and changed and self.started:
            named = [f"{k}: {_short(old.get(k))} there, {_short(new.get(k))} now" for k in changed[:_NAMED]]
            what = "; ".join(named) + (f"; and {len(changed) - _NAMED} more" if len(changed) > _NAMED else "")
            raise UserError(
                f"{self.path} already holds another run ({what}); set run.name to a new name, "
                "or put these keys back to continue that run. Nothing was overwritten"
            )

    def outcome_since(self, time: float) -> int | None:
        """The code of an outcome written after `time` (of the clock `time.time`); None where there is none."""
        try:
            written = self.outcome.stat().st_mtime
            return int(json.loads(self.outcome.read_text())["code"]) if written >= time else None
        except (OSError, ValueError, KeyError):
            return None

    def write_outcome(self, code: int, why: str, step: int) -> None:
        """Record how the run ended, for the batch script that started it."""
        write_atomic(self.outcome, json.dumps({"code": code, "why": why, "step": step}) + "\n")
