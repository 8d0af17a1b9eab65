"""The ledger: what a run did, one JSON object a line; a kill at any moment loses at most the last line."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from millrace.core.errors import UserError

# Ends a line that a crash cut short, so that the next record starts on a line of its own and `read` can tell
# an accident that was noticed from a file that somebody damaged.
_TORN = b" #torn\n"
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# A text that would be read back as a float is stored behind one more "=".
_LOOKS_NON_FINITE = re.compile(r"=*(nan|inf|-inf)")


class Ledger:
    """Append-only JSON lines at `path`; parent folders are created.

    `owner` is the number of the lease of who writes, and stands in every record: what a former owner still writes
    after another has taken over is left out when the ledger is read.

    Every record is one `write` to a descriptor opened with O_APPEND: whole in the page cache before `append`
    returns (a SIGKILL of the process loses nothing), and on the disk where `fsync=True`.

    Raises:
        UserError: the file cannot be opened or written, a full disk for one.
    """

    def __init__(self, path: str | Path, owner: int = 0) -> None:
        self.path, self._owner = Path(path), owner
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot open the ledger {self.path}: {error.strerror}") from None
        self._seal = _seal(self._fd)

    def append(self, event: str, *, fsync: bool = False, **fields: Any) -> None:
        """Write `{"event", "time" (unix seconds), "owner", **fields}`; `fsync` waits until it is on the disk.

        Fields are plain JSON values, or numpy or torch scalars. Non-finite floats are kept.

        Raises:
            TypeError: a field that JSON cannot hold, such as a tensor of several elements.
            UserError: the line could not be written.
        """
        assert not {"event", "time", "owner"} & fields.keys(), "event, time and owner are the ledger's own"
        record: dict[str, Any] = {"event": event, "time": time.time()}
        if self._owner:
            record["owner"] = self._owner
        for name, value in fields.items():
            record[name] = _plain(value, name)
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        self._write(self._seal + line)
        if fsync:
            os.fsync(self._fd)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            # A part of the line may stand in the file; look again before the next record.
            self._seal = _seal(self._fd)
            mend = "; free space and start the run again, it resumes" if error.errno == errno.ENOSPC else ""
            raise UserError(f"cannot write the ledger {self.path}: {error.strerror}{mend}") from None
        self._seal = b""

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _seal(fd: int) -> bytes:
    """What must precede the next record: nothing, or the end of a line that a crash cut short."""
    size = os.fstat(fd).st_size
    line = b""
    while len(line) < size and b"\n" not in line:
        start = max(0, size - len(line) - 65536)
        line = os.pread(fd, size - len(line) - start, start) + line
    line = line.rpartition(b"\n")[2]
    if not line:
        return b""
    return b"\n" if _parse(line) else _TORN


def _plain(value: Any, name: str) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return f"={value}" if _LOOKS_NON_FINITE.fullmatch(value) else value
    if isinstance(value, float):
        value = float(value)
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in value]
    if isinstance(value, os.PathLike):
        return _plain(os.fspath(value), name)
    try:
        # `item` keeps a numpy or torch integer an integer; anything else must be a number.
        return _plain(value.item() if hasattr(value, "item") else float(value), name)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"the ledger cannot hold {name}, a {type(value).__name__}") from None


def _restore(value: Any) -> Any:
    if isinstance(value, str) and _LOOKS_NON_FINITE.fullmatch(value):
        return value[1:] if value.startswith("=") else _NON_FINITE[value]
    if isinstance(value, dict):
        return {key: _restore(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restore(item) for item in value]
    return value


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "event" in record else None


def read(path: str | Path) -> list[dict[str, Any]]:
    """Every record of the ledger at `path`, in order, but for a line that a crash cut short.

    What a former owner wrote after a later one had begun is left out.

    Raises:
        UserError: no such file, or a damaged line elsewhere than at a place where a run was cut off.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read the ledger {path}: {error.strerror}") from None
    records, owner = [], 0
    for number, line in enumerate(lines, 1):
        record = _parse(line)
        if record is not None:
            if (by := record.get("owner", owner)) >= owner:
                owner = by
                records.append(_restore(record))
        elif line.strip() and number < len(lines) and not line.endswith(_TORN.rstrip(b"\n")):
            raise UserError(
                f"{path}:{number} is damaged ({line[:40]!r}…); repair or delete that line: the other records are intact"
            )
    return records


def read_event(path: str | Path, event: str) -> list[dict[str, Any]]:
    """Records of one rare event, in order: other lines, of which there may be millions, are neither parsed nor kept.

    Raises:
        UserError: no such file.
    """
    try:
        with open(path, "rb") as lines:
            found = [_parse(line.rstrip(b"\n")) for line in lines if event.encode() in line]
    except OSError as error:
        raise UserError(f"cannot read the ledger {path}: {error.strerror}") from None
    return [_restore(record) for record in found if record is not None and record["event"] == event]


def last_event(path: str | Path, event: str) -> dict[str, Any] | None:
    """The last record of `event`, found from the end; None where there is none, or no ledger."""
    wanted, tail = f'"event":"{event}"'.encode(), b""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 2**20)
            file.seek(start)
            lines = (file.read(end - start) + tail).split(b"\n")
            tail, end = lines[0], start  # the first line may begin further ahead
            if start:
                del lines[0]
            for line in reversed(lines):
                if wanted in line and (record := _parse(line)) and record["event"] == event:
                    return dict(_restore(record))
    return None


@dataclass(frozen=True)
class Consumed:
    """What a run with restarts really trained on.

    `steps` holds the one effective record of each step in order, `recomputed` counts step records that a
    restart or a rollback threw away, `restarts` the steps (0 is the beginning) from which the run continued.
    """

    steps: list[dict[str, Any]]
    recomputed: int
    restarts: list[int]


def consumed(records: Iterable[dict[str, Any]]) -> Consumed:
    """The effective steps of a run: returning to step r throws away every record of a later step."""
    records = list(records)
    steps = effective(records, "step")
    computed = sum(record["event"] == "step" for record in records)
    return Consumed(steps, computed - len(steps), _restarts(records))


def effective(records: Iterable[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    """The records of `event` (one that carries a step) in the history with which the run ended."""
    kept: list[dict[str, Any]] = []
    for record in records:
        kind = record["event"]
        if kind == "start":
            limit = record.get("resumed_from") or 0
        elif kind in ("resume", event):
            # One record for each step; but a step may have several samples, one for each prompt.
            limit = record["step"] - (kind == "step")
        else:
            continue
        while kept and kept[-1]["step"] > limit:
            kept.pop()
        if kind == event:
            kept.append(record)
    return kept


def _restarts(records: Iterable[dict[str, Any]]) -> list[int]:
    """Steps that the run returned to: every start but the first, and every rollback inside a start."""
    found: list[int] = []
    starts, stepped = 0, False
    rollback: int | None = None
    for record in records:
        kind = record["event"]
        if kind == "start":
            if starts:
                found.append(record.get("resumed_from") or 0)
            # The resume beside a start, before or after it, tells of the same return.
            starts, stepped, rollback = starts + 1, False, None
        elif kind == "resume" and stepped:
            rollback = record["step"]
        elif kind == "step":
            if rollback is not None:
                found.append(rollback)
            stepped, rollback = True, None
    return found
