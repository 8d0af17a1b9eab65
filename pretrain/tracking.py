"""Tracking: every event goes into the ledger; wandb gets a copy in the background and never holds a run up.

wandb is imported, started, fed and finished on daemon threads with time limits. A network that is away, a
server that hangs or an exception costs one warning: online falls back to offline, offline to nothing.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from millrace.core.bounded import bounded
from millrace.core.console import say, warn
from millrace.core.ledger import Ledger
from millrace.core.rundir import RunDir
from millrace.pretrain.track_config import TrackConfig

# Events that a power cut may not lose: they decide where a run continues and what its report says.
_DURABLE = frozenset({"start", "checkpoint", "resume", "end"})
# wandb's exit handler waits for a start under way, so this also bounds how long a finished run can linger.
_INIT_SECONDS = 5.0
_PROBE_SECONDS = 3.0
_FINISH_SECONDS = 12.0
_QUEUE = 10_000


class Tracker:
    """Writes the run's ledger, and sends the same events to wandb where `config` asks for it.

    `enabled` is true on rank 0 only; elsewhere every call does nothing. `resolved_config` is the whole
    configuration as plain values, shown by wandb beside the curves; it holds no secrets. `owner` is for the ledger.

    Raises:
        UserError: the ledger cannot be opened or written.
    """

    def __init__(
        self,
        config: TrackConfig,
        run_dir: str | Path,
        resolved_config: dict[str, Any],
        enabled: bool = True,
        owner: int = 0,
    ) -> None:
        self._every = config.log_every
        self._ledger = Ledger(RunDir(run_dir).ledger, owner) if enabled else None
        self._wandb: _Wandb | None = None
        if enabled and config.wandb != "disabled":
            self._wandb = _Wandb(config, RunDir(run_dir), resolved_config)

    def log(self, event: str, **fields: Any) -> None:
        """Record one event with its fields (plain values, or numpy or torch scalars)."""
        if self._ledger is None:
            return
        self._ledger.append(event, fsync=event in _DURABLE, **fields)
        if self._wandb is not None and not (event == "step" and fields["step"] % self._every):
            self._wandb.put(_point(event, fields))

    def close(self) -> None:
        """End the ledger and, within a bounded time, what wandb still holds; a second call does nothing."""
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _point(event: str, fields: dict[str, Any]) -> dict[str, Any]:
    """`eval, {"step": 4, "loss": 2.0}` → `{"step": 4, "eval/loss": 2.0}`; only what a panel can show."""
    point: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                add(f"{name}/{key}", item)
        elif hasattr(value, "item"):
            point[name] = value.item()
        elif isinstance(value, (int, float)) or (event == "sample" and isinstance(value, str)):
            point[name] = value

    for key, value in fields.items():
        add(key if key == "step" else f"{event}/{key}", value)
    return point


class _Wandb:
    """A wandb run behind a bounded queue; `put` never waits, `close` waits for a bounded time."""

    def __init__(self, config: TrackConfig, run_dir: RunDir, resolved_config: dict[str, Any]) -> None:
        self._config, self._run_dir, self._resolved = config, run_dir, resolved_config
        self._points: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUE)
        self._dropped = 0
        self._failed = self._warned = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def put(self, point: dict[str, Any]) -> None:
        try:
            self._points.put_nowait(point)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        try:
            self._points.put_nowait(None)
            self._thread.join(_FINISH_SECONDS)
        except queue.Full:
            pass
        missing = self._dropped + (self._points.qsize() if self._thread.is_alive() else 0)
        if self._thread.is_alive():
            warn(f"wandb did not finish within {_FINISH_SECONDS:.0f} s; the run ends without it")
        if missing and not self._failed:
            warn(f"wandb missed {missing} points; the ledger {self._run_dir.ledger} has all of them")

    def _work(self) -> None:
        run = self._start()
        self._failed = run is None
        while (point := self._points.get()) is not None:
            if run is not None:
                self._guard(run.log, point)
        if run is not None:
            self._guard(run.finish)

    def _guard(self, call: Callable[..., Any], *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:
            if not self._warned:
                warn(f"wandb refused a record ({_first_line(error)}); the ledger has it")
            self._warned = True
            self._dropped += 1

    def _start(self) -> Any:
        """A wandb run, online if that was asked and works, else offline; None where neither does."""
        mode: str = self._config.wandb
        if mode == "online" and not os.environ.get("WANDB_API_KEY"):
            warn("track.wandb = 'online' needs WANDB_API_KEY in the environment; recording offline")
            mode = "offline"
        start_offline: Callable[[], Any] = partial(self._init, "offline")
        if mode == "online":
            try:
                bounded(_probe, _PROBE_SECONDS)
                run = bounded(partial(self._init, "online"), _INIT_SECONDS)
                say(f"wandb: {run.url}")
                return run
            except Exception as error:
                later = f"wandb sync {self._run_dir.path}/wandb/offline-*"
                warn(f"wandb cannot be reached ({_first_line(error)}); recording offline, send it later with: {later}")
                start_offline = self._init_again
        try:
            return bounded(start_offline, _INIT_SECONDS)
        except Exception as error:
            warn(f"wandb does not start ({_first_line(error)}); the ledger goes on without it")
            return None

    def _init_again(self) -> Any:
        import wandb

        # The background process of a failed start would refuse the run's id, as in use.
        wandb.teardown()
        return self._init("offline")

    def _init(self, mode: str) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        # wandb reports its own errors to its makers, offline too, and at exit waits 20 s for a silent server.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        settings = wandb.Settings(
            init_timeout=_INIT_SECONDS,
            finish_timeout=_FINISH_SECONDS,
            silent=True,
            console="off",  # wandb would replace stdout and stderr, and with them the progress display
            disable_git=True,
        )
        run_id = _run_id(self._run_dir)
        run = wandb.init(
            mode=mode,  # type: ignore[arg-type]
            project=self._config.project,
            entity=self._config.entity,
            tags=list(self._config.tags),
            config=self._resolved,
            dir=str(self._run_dir.path),
            name=self._run_dir.path.name,
            id=run_id,
            resume="allow",
            settings=settings,
        )
        # A restarted run logs earlier steps again, which wandb's own step counter would refuse.
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return run


def _probe() -> None:
    """Raise OSError where wandb's server takes no connection: wandb itself would try until its time is up."""
    if urllib.request.getproxies():
        return
    base = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    url = urllib.parse.urlsplit(base)
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((url.hostname, port), _PROBE_SECONDS).close()
    except OSError as error:
        raise OSError(f"{base}: {error.strerror or error}") from None


def _run_id(run_dir: RunDir) -> str:
    """The run's own id, so that every start of one run continues one wandb run."""
    return str(json.loads(run_dir.identity.read_text())["id"])


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
