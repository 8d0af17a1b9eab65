"""What the benchmarks share: the environment's record, fresh processes, random order, quartiles and dated results."""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from millrace.core.console import say, show_table, warn

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


def interleave(
    arms: Mapping[str, Callable[[], dict[str, Any]]], rounds: int, seed: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """Measure every arm once a round, in a new random order each round, so that a slow minute hits no arm alone."""
    order = random.Random(seed)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for number in range(rounds):
        names = list(arms)
        order.shuffle(names)
        for place, name in enumerate(names, 1):
            say(f"round {number + 1}/{rounds}, {place}/{len(names)}: {name}")
            result = arms[name]()
            found[name].append(result)
            if "error" in result:
                warn(f"{name}: {result['error']}")
    return found


def fresh(script: str, job: Mapping[str, Any], ranks: int = 1, *, quiet: bool = True) -> dict[str, Any]:
    """Run `python SCRIPT --worker JOB` as `ranks` new processes; rank 0's result (see `worker_result`).

    The cores are divided among the ranks. A failure is a result too, `{"error": last lines}`, so that one arm which a
    library cannot do does not end a long benchmark.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        children = []
        for rank in range(ranks):
            env = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "BENCHMARK_RESULT": str(out),
                "OMP_NUM_THREADS": str(max(1, cores() // ranks)), "TOKENIZERS_PARALLELISM": "false",
            }  # fmt: skip
            log = open(Path(folder) / f"{rank}.log", "w") if quiet else None  # noqa: SIM115 (lives as long as the child)
            command = [sys.executable, script, "--worker", json.dumps(job)]
            children.append(
                subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=ROOT, preexec_fn=_die_with_parent)
            )
        codes = _wait_all(children)
        if out.exists() and not any(codes):
            return dict(json.loads(out.read_text()))
        logs = [Path(folder) / f"{rank}.log" for rank in range(ranks)]
        said = next((p.read_text() for p, code in zip(logs, codes, strict=True) if code > 0 and p.exists()), "")
        return {"error": f"exit codes {codes}: " + "\n".join(said.replace(f"{ROOT}/", "").splitlines()[-12:])}


def _die_with_parent() -> None:
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
