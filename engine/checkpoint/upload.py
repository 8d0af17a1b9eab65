"""Copies of checkpoints in an object store, made behind the training steps.

    PREFIX/run.json                       whose checkpoints these are; written first
    PREFIX/step-00000100/…                the files of a checkpoint
    PREFIX/step-00000100/MANIFEST.json    written last: a step that has one is complete by construction

A thread asks the store; reading, hashing and sending are done by obstore outside of Python's lock. Nothing that a store
does, or does not do, fails or delays the run, and nothing is ever removed from it but a manifest that is replaced.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.core.errors import UserError
from millrace.core.rundir import RunDir
from millrace.data.stores.folder import RemoteFolder
from millrace.data.stores.waiting import Patience
from millrace.engine.checkpoint.retention import read_saved

MANIFEST, IDENTITY = "MANIFEST.json", "run.json"
MOST = 2**28  # bytes of a JSON file that is read from a store
PATIENCE = Patience(stall=20.0, deadline=40.0)  # for one request with its repetitions


@dataclass(frozen=True)
class Uploaded:
    """What became of a checkpoint: bytes and seconds until it was complete in the store, or why it is not."""

    step: int
    to: str
    seconds: float
    bytes: int = 0
    why: str = ""


class Uploader:
    """Copies checkpoints of the run in `rundir` to `url`, one at a time; make it on rank 0."""

    def __init__(self, url: str, rundir: RunDir, patience: Patience = PATIENCE) -> None:
        self._folder, self._rundir = RemoteFolder(url, patience), rundir
        self._changed = threading.Condition()
        self._next: Path | None = None
        self._now: Path | None = None
        self._told: list[Uploaded] = []
        self._owned = False
        self.failing = False  # whether the last attempt failed
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where to."""
        return self._folder.url

    @property
    def steps(self) -> set[int]:
        """Steps that are being copied, or will be: their files must stay."""
        with self._changed:
            return {int(path.name[5:]) for path in (self._now, self._next) if path}

    def offer(self, path: Path) -> None:
        """Copy the checkpoint `path`, unless it only bridges the time to the next or is in the store already.

        While another is being copied it waits; of those that wait only the newest is kept.
        """
        if read_saved(path).ephemeral:
            return
        with self._changed:
            if self._next:
                self._told.append(self._result(self._next, 0.0, why="the store is slow, and a newer one goes first"))
            self._next = path
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="millrace-upload", daemon=True)
            self._thread.start()

    def told(self) -> list[Uploaded]:
        """What happened since the last call."""
        with self._changed:
            told, self._told = self._told, []
        return told

    def _result(self, path: Path, seconds: float, count: int = 0, why: str = "") -> Uploaded:
        return Uploaded(int(path.name[5:]), f"{self.url}/{path.name}", seconds, count, why)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next)
                self._now, self._next = self._next, None
            assert self._now is not None
            result = self._attempt(self._now)
            with self._changed:
                self._told += [result] if result else []
                self.failing = result is not None and bool(result.why)
                self._now = None

    def _attempt(self, path: Path) -> Uploaded | None:
        began = time.monotonic()
        try:
            count = self._copy(path)
        except (OSError, UserError) as error:
            return self._result(path, time.monotonic() - began, why=str(error))
        except Exception as error:  # a thread's would be lost
            return self._result(path, time.monotonic() - began, why=repr(error))
        return self._result(path, time.monotonic() - began, count) if count else None

    def _copy(self, path: Path) -> int:
        """Bytes that were written; 0 where the same checkpoint is there already."""
        self._own()
        manifest, name = (path / MANIFEST).read_bytes(), path.name
        there = self._folder.get(f"{name}/{MANIFEST}", MOST)
        if there == manifest:
            return 0
        if there is not None:  # the step was computed again, from an older checkpoint
            self._folder.delete(f"{name}/{MANIFEST}")
        files = json.loads(manifest)["files"]
        for file in files:
            self._folder.put(f"{name}/{file}", path / file)
        self._folder.put(f"{name}/{MANIFEST}", manifest)
        return sum(entry["size"] for entry in files.values()) + len(manifest)

    def _own(self) -> None:
        """Write down whose checkpoints these are.

        Raises:
            UserError: another run's.
        """
        if self._owned:
            return
        mine: dict[str, Any] = json.loads(self._rundir.identity.read_text()) | {"name": self._rundir.path.name}
        there = self._folder.get(IDENTITY, MOST)
        if there is None:
            self._folder.put(IDENTITY, json.dumps(mine, indent=1).encode())
        elif (other := json.loads(there)).get("id") != mine["id"]:
            raise UserError(
                f"{self.url} holds the checkpoints of another run ('{other.get('name')}', {other.get('id')}); set "
                "checkpoint.upload to another prefix"
            )
        self._owned = True
