"""What the benchmarks share: the environment's record, fresh processes, random order, quartiles and dated results."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import os
import platform
import random
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from millrace.core.console import show_table, warn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("millrace", "torch", "deepspeed", "accelerate", "transformers", "tokenizers", "numpy")


def environment() -> dict[str, Any]:
    """Where and with what a result was measured."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len(_git("status", "--porcelain").splitlines()),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": cores(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "malloc_mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_"),
        "gpus": gpus(),
        "load_average_before": os.getloadavg()[0],
        "versions": versions,
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """Names of the GPUs, asked of the driver."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:
        return []
    return [line for line in done.stdout.splitlines() if line.startswith("GPU ")]


def warn_if_busy() -> None:
    """Say so when other processes compute: timings would measure them too."""
    if os.getloadavg()[0] > 0.5 * cores():
        warn(f"the load average is {os.getloadavg()[0]:.1f} on {cores()} cores: timings will be too slow")


def take_turns(arms: Mapping[str, Workers], turns: int, seed: int = 0) -> list[dict[str, float]]:
    """Seconds of every arm in each of `turns` rounds, in a new random order each, so that a slow moment hits all alike.

    All arms have asked for a turn; an arm that ends too early is missing from then on.
    """
    order = random.Random(seed)
    alive = list(arms)
    found: list[dict[str, float]] = []
    for _ in range(turns):
        order.shuffle(alive)
        seconds = {name: arms[name].turn() for name in alive}
        found.append({name: took for name, took in seconds.items() if took is not None})
        alive = [name for name in alive if name in found[-1]]
    return found


def fresh(script: str, job: Mapping[str, Any], ranks: int = 1) -> dict[str, Any]:
    """Run `python SCRIPT --worker JOB` as `ranks` new processes; rank 0's result (see `worker_result`).

    A failure is a result too, `{"error": last lines}`, so that one arm which a library cannot do does not end a long
    benchmark.
    """
    with Workers(script, job, ranks) as workers:
        return workers.result()


class Workers:
    """`python SCRIPT --worker JOB` as `ranks` new processes, among which the cores are divided.

    They run freely until they call `Turns.next`; from then on they wait until `turn` lets them go on. Leaving the
    block ends them.
    """

    def __init__(self, script: str, job: Mapping[str, Any], ranks: int) -> None:
        self.ranks = ranks
        self._folder = tempfile.TemporaryDirectory()
        self._out = Path(self._folder.name) / "result.json"
        self._logs = [Path(self._folder.name) / f"{rank}.log" for rank in range(ranks)]
        done, self._done = os.pipe()
        self._reports = os.fdopen(done)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._children = [self._start(script, job, rank, port) for rank in range(ranks)]
        os.close(self._done)  # the children hold it: when they end, reading it ends

    def _start(self, script: str, job: Mapping[str, Any], rank: int, port: int) -> subprocess.Popen[bytes]:
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.ranks), "LOCAL_WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "BENCHMARK_RESULT": str(self._out),
            "BENCHMARK_TURNS": str(self._done), "OMP_NUM_THREADS": str(max(1, cores() // self.ranks)),
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        command = [sys.executable, script, "--worker", json.dumps(job)]
        with open(self._logs[rank], "w") as log:
            return subprocess.Popen(
                command, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=ROOT, pass_fds=[self._done],
                preexec_fn=die_with_parent, bufsize=0,  # closing the pipe to a dead child must have nothing to send
            )  # fmt: skip

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
            child.wait()
            child.stdin.close()  # type: ignore[union-attr]
        self._reports.close()
        self._folder.cleanup()

    def ready(self) -> float | None:
        """Wait until rank 0 asks for its next turn; the seconds that it worked, None when a rank ended instead."""
        while not select.select([self._reports], [], [], 1.0)[0]:
            if any(child.poll() is not None for child in self._children):
                return None
        said = self._reports.readline()
        return float(said) if said else None

    def go(self) -> None:
        """Let all ranks go on."""
        for child in self._children:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(b"g")  # type: ignore[union-attr]

    def turn(self) -> float | None:
        """Let all ranks go on until rank 0 asks again; as `ready`."""
        self.go()
        return self.ready()

    def result(self) -> dict[str, Any]:
        """Wait for the end; rank 0's result, or `{"error": last lines}`."""
        codes = _wait_all(self._children)
        if self._out.exists() and not any(codes):
            return dict(json.loads(self._out.read_text()))
        said = next((p.read_text() for p, code in zip(self._logs, codes, strict=True) if code > 0), "")
        return {"error": f"exit codes {codes}: " + "\n".join(said.replace(f"{ROOT}/", "").splitlines()[-12:])}


class Turns:
    """In a worker: stops after every `steps` steps until the parent gives it the next turn."""

    def __init__(self, warmup: int, steps: int) -> None:
        self._left, self._steps, self._began = warmup, steps, time.perf_counter()

    def step_done(self) -> None:
        """Call after every step, on every rank."""
        self._left -= 1
        if self._left == 0:
            self._left = self._steps
            self._report(time.perf_counter() - self._began)
            os.read(sys.stdin.fileno(), 1)
            self._began = time.perf_counter()

    def _report(self, seconds: float) -> None:
        if os.environ.get("RANK", "0") == "0":
            os.write(int(os.environ["BENCHMARK_TURNS"]), f"{seconds}\n".encode())


def die_with_parent() -> None:
    """In the child: ask Linux to kill it when the benchmark dies, however it dies."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _wait_all(children: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait; when one fails, or on Ctrl-C, end the others, which would wait for it for ever."""
    try:
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children):
                break
            for child in children:
                try:
                    child.wait(0.2)
                except subprocess.TimeoutExpired:
                    break
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
    return [child.wait() for child in children]


def worker_result(**values: Any) -> None:
    """Hand a measurement from a worker to its parent (rank 0 only)."""
    if os.environ.get("RANK", "0") == "0":
        Path(os.environ["BENCHMARK_RESULT"]).write_text(json.dumps(values))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile), by linear interpolation."""
    if len(values) < 2:
        return (values[0],) * 3
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, middle, third


def save(name: str, result: Mapping[str, Any]) -> Path:
    """Write benchmarks/results/NAME-YYYY-MM-DD.json; a second result of a day gets a number."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{datetime.date.today().isoformat()}"
    path, number = RESULTS / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = RESULTS / f"{stem}.{number}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def report(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], path: Path) -> None:
    """Print a table and where the figures are."""
    show_table(title, columns, rows)
    print(path)
