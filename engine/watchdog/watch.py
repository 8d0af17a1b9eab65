"""The rank's side of the watchdog: say what it is at, and start the process that watches it."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from millrace.core.errors import PeerLost
from millrace.engine.distributed import World
from millrace.engine.watchdog.config import WatchdogConfig
from millrace.engine.watchdog.heartbeat import Heartbeat
from millrace.engine.watchdog.watcher import Job

# What gloo and NCCL say when the other end is gone.
_PEER_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited")


class Watch:
    """A context in which this rank is watched; `enter` says what it is at.

    Made on every rank; `hosts` names the node of each. `owner` is the number of the run directory's owner. All threads'
    stacks are written when the watcher asks by SIGUSR2.
    """

    def __init__(self, config: WatchdogConfig, run: Path, world: World, owner: int) -> None:
        self.hosts: list[str] = world.gather_objects(socket.gethostname())
        self._enabled = config.enabled
        self._folder = Path(tempfile.mkdtemp(prefix="millrace-watch-"))
        self._beat = Heartbeat(self._folder / "beat")
        self._job = Job(os.getpid(), str(self._folder), str(run), world.rank, self.hosts, owner, config.limits())
        self.enter = self._beat.enter

    def __enter__(self) -> Watch:
        if self._enabled:
            self._stacks = open(self._folder / "stacks", "w")
            faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
            command = [sys.executable, "-m", "millrace.engine.watchdog.watcher", json.dumps(asdict(self._job))]
            # A session of its own: Ctrl-C and what a launcher sends to its group are not for it.
            self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            with contextlib.suppress(OSError):
                self._watcher.communicate()  # the end of its input is its end
            faulthandler.unregister(signal.SIGUSR2)
            self._stacks.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        if isinstance(error, RuntimeError) and (found := _PEER_LOST.search(str(error))):
            place = "in '{}' of step {}".format(*self._beat.at) + f" ({found[0]})"
            raise PeerLost(
                f"rank {self._job.rank} on {socket.gethostname()} lost another rank {place}; what that one said tells "
                "why. The same command continues from the last checkpoint"
            ) from error
