"""Ranks that need not import torch and DeepSpeed: `python forkserver.py SOCKET` has, and forks them.

A rank spends seven seconds on importing other people's code, a tiny model far less on its steps. Here those imports are
done once. Our own modules are imported anew by every rank, which is a process of its own in all that can be seen of it:
session, environment, arguments, output, exit handlers and exit code.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from select import select
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = (  # setuptools first: it replaces distutils, and says so where that was there before
    "setuptools", "torch", "torch._dynamo", "torch.utils.cpp_extension", "deepspeed", "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.ops.op_builder.all_ops", "accelerate", "transformers.modeling_utils",
    "transformers.integrations.deepspeed", "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3", "tokenizers", "safetensors.torch", "rich.console", "psutil", "tomli_w",
    "xxhash", "matplotlib.figure", "matplotlib.backends.backend_svg", "matplotlib.backends.backend_agg",
)  # not pyarrow: it starts a thread  # fmt: skip
LARGEST = 2**17  # bytes of a request


class Fork:
    """A process that a server forked: what `subprocess.Popen` says of its own."""

    def __init__(self, report: int) -> None:
        self._report, self._read = report, b""
        self.returncode: int | None = None
        pid = self._number(240)
        assert pid, "the fork server does not answer"
        self.pid = pid

    def _number(self, seconds: float | None) -> int | None:
        """The next number that is told; None where it does not come in time."""
        until = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._read:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select([self._report], [], [], left)[0]:
                return None
            more = os.read(self._report, 64)
            assert more, "the process that watches the rank is gone"
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return int(line)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; where a signal ended it, that with a minus.

        Raises:
            subprocess.TimeoutExpired: it is still alive.
        """
        if self.returncode is None:
            status = self._number(timeout)
            if status is None:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self.returncode = os.waitstatus_to_exitcode(status)
            os.close(self._report)
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, None while it is alive."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As of `subprocess.Popen`."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Server:
    """A process that forks; it ends with this one."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(command, env=environment, cwd=ROOT, pass_fds=[theirs.fileno()])
        theirs.close()
        atexit.register(self.close)

    def close(self) -> None:
        """End it."""
        self._control.close()
        self._process.wait()

    def start(self, arguments: Sequence[str], environment: dict[str, str], out: int, err: int) -> Fork:
        """`python ARGUMENTS`: a script, or -m and a module, and their own; `out` and `err` are descriptors."""
        ours, theirs = os.pipe()
        request = json.dumps([list(arguments), environment]).encode()
        assert len(request) < LARGEST
        socket.send_fds(self._control, [request], [theirs, out, err])
        os.close(theirs)
        return Fork(ours)


def serve(control: socket.socket) -> list[str]:
    """Fork at every request; a forked process returns, with the arguments that it is to run."""
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    signal.signal(signal.SIGCHLD, _bury)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end the ranks
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, LARGEST, 3)
        if not request:
            sys.exit()
        if os.fork() == 0:
            control.close()
            return _become(request, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _bury(*_: Any) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _become(request: bytes, report: int, out: int, err: int) -> list[str]:
    """Two processes: one that tells how the other ends, and the rank."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: it ends with the server, as a launcher does
        os.close(out), os.close(err)
        os.write(report, b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        os.write(report, b"%d\n" % status)
        os._exit(0)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for descriptor in (report, out, err):
        os.close(descriptor)
    arguments, environment = json.loads(request)
    os.environ.clear()
    os.environ.update(environment)
    return list(arguments)


def run(arguments: list[str]) -> None:
    """What `python ARGUMENTS` does."""
    import numpy

    numpy.random.seed()  # torch's seed is the same in all processes, numpy's is not
    module = arguments[0] == "-m"
    sys.argv = arguments[1:] if module else arguments
    sys.path[0] = str(ROOT if module else Path(arguments[0]).parent)
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # what is here is here for ever
    run(serve(socket.socket(fileno=int(sys.argv[1]))))
