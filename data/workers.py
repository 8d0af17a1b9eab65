"""The worker processes of a rank: frames in the order of the steps, and a new worker where one died."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping

from millrace.core.console import warn
from millrace.core.errors import UserError
from millrace.data.builder import Spec
from millrace.data.frames import Frame, read_frame
from millrace.data.state import LoaderState

_DEATHS = 3  # workers that may die without a step in between
_PIPE_BYTES = 2**20


class Workers:
    """`count` processes; step s is built by number s mod `count`. Call `next` from one thread."""

    def __init__(self, spec: Spec, state: LoaderState, count: int) -> None:
        self._spec, self._state, self._count = spec, state, count
        self._exclude: dict[str, str] = {}
        self._stalls: list[str] = []
        self._lock = threading.Lock()
        self._closed = False
        self._number = 0  # of the next step, from the start
        self._processes: list[subprocess.Popen[bytes]] = []  # from the first `next` on

    def _start(self, offset: int) -> subprocess.Popen[bytes]:
        threads = str(self._spec.config.threads)
        process = subprocess.Popen(
            [sys.executable, "-m", "millrace.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"},
            start_new_session=True,  # Ctrl-C is the rank's; when that ends in any way, its end of stdin ends the worker
        )
        with contextlib.suppress(OSError):  # a smaller pipe is slower, nothing else
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # type: ignore[arg-type]
        start = {
            "spec": self._spec.to_json(),
            "state": self._state.to_dict(),
            "offset": offset,
            "stride": self._count,
            "exclude": self._exclude,
        }
        self._tell(process, start)
        return process

    def _tell(self, process: subprocess.Popen[bytes], message: Mapping[str, object]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died; `next` sees that
            process.stdin.write(json.dumps(message).encode() + b"\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]

    def next(self) -> tuple[Frame, LoaderState]:
        """The next step, and the state after it.

        Raises:
            StopIteration: another thread closed this meanwhile.
            UserError: what a worker met, or a worker that dies again and again.
        """
        deaths = 0
        with self._lock:
            if not self._processes and not self._closed:
                self._processes = [self._start(offset) for offset in range(self._count)]
        while not self._closed:
            process = self._processes[self._number % self._count]
            frame = read_frame(process.stdout)  # type: ignore[arg-type]
            if frame is not None and "stalls" in frame.meta:
                self._stalls = frame.meta["stalls"]
            elif frame is not None:
                return self._take(frame)
            else:
                deaths += 1
                self._restart(process, deaths)
        raise StopIteration

    def _take(self, frame: Frame) -> tuple[Frame, LoaderState]:
        if "error" in frame.meta:
            raise UserError(frame.meta["error"])
        self._state, self._stalls = LoaderState.from_dict(frame.meta["state"]), []
        self._number += 1
        return frame, self._state

    def _restart(self, process: subprocess.Popen[bytes], deaths: int) -> None:
        code = process.wait()
        if self._closed:
            return
        what = f"a data worker ended with {f'signal {-code}' if code < 0 else f'code {code}'}"
        if deaths == _DEATHS:
            raise UserError(
                f"{what}, {_DEATHS} times before it had built its step; if it was killed for memory, lower "
                "data.workers, data.window or data.prefetch. With data.workers = 0 its error is shown"
            )
        warn(f"{what}; a new one builds its steps")
        with self._lock:
            _close_pipes(process)
            if not self._closed:
                self._processes[self._number % self._count] = self._start(0)

    def stalls(self) -> list[str]:
        """Reads that take long, as the worker whose step is due said last."""
        return self._stalls

    def exclude(self, bad: Mapping[int, str]) -> None:
        """As `Documents.exclude`, in all workers."""
        with self._lock:
            new = {str(sample): why for sample, why in bad.items()}
            self._exclude |= new
            for process in self._processes:
                self._tell(process, {"exclude": new})

    def close(self) -> None:
        """End the processes; a `next` under way ends too."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.wait()


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # type: ignore[union-attr]
