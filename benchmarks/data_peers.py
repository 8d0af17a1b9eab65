"""Data loading beside peers: the same payloads, decoding and batches through millrace and four other libraries.

    python benchmarks/data_peers.py                                  # everything: about seven hours on 2 cores
    python benchmarks/data_peers.py --only 'speed/*/local/*' --rounds 5             # about an hour
    python benchmarks/data_peers.py --only '*/tokens/*' '*/images/local/w2/ours-*' --scale 0.1 --rounds 1
    python benchmarks/data_peers.py --list

Payloads (`peers/payloads.py`): 200k texts of log-normal length and their tokens, 8k JPEGs of 256 px, 2k FLAC clips of
4 s, sorted by class, as Parquet, tar, MDS and litdata chunks. Each arm runs in its library's environment
(`peers/environments.py`) and shuffles as its documentation recommends (`peers/arms/`). Every measurement is a fresh
process; in every round the arms of a group come in a new random order. A cell is MEASURE/MODALITY/STORE/wWORKERS/ARM:

    speed   samples/s and samples per CPU-second of the process tree, between 10% and 70% of the first samples of an
            epoch, so that the pipeline is as full at the end as at the beginning; seconds from the start of the
            process, and from the opening of the stream, to the first batch
    memory  peak of the process tree's PSS
    order   one epoch: shuffle quality, what came twice or never; seconds to the first batch of new processes that
            resume at 10, 50 and 90% of it, and what came twice or never over both
    kill    SIGKILL of the process group at a random moment, resumed from the last saved state: what came twice or
            never, what is left in /dev/shm, who survived

The stores are the local folder, read once before so that it is cached, and `peers/server.py`, an object server on
loopback that waits 20 ms before every answer. The libraries' own caches are empty at each start.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
from peers import environments, measure, payloads, write
from peers.job import Job
from peers.payloads import VOCABULARY

from millrace.core.console import say, show_table, warn
from millrace.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

ARMS = ("ours-parquet", "ours-tar", "ours-mds", "mosaicml", "litdata", "webdataset", "datasets", "ceiling")
BATCH = {"text": 64, "tokens": 64, "images": 32, "audio": 32}
# Samples of `speed` and `memory`: as many as most arms take in about five seconds.
LIMITS = {"text": 15_000, "tokens": 50_000, "images": 4_000}
STORES, WORKERS = ("local", "server"), (0, 1, 2)
# (modalities, stores, workers) of each measure. Text comes in the same order as its tokens.
CELLS = {
    "speed": (("text", "tokens", "images", "audio"), STORES, WORKERS),
    "memory": (("text", "tokens", "images", "audio"), STORES, (0, 2)),
    "order": (("tokens", "images", "audio"), ("local",), (0, 2)),
    "kill": (("tokens", "images", "audio"), ("local",), (0, 2)),
}


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    measure: str
    modality: str
    store: str
    workers: int
    arm: str

    @property
    def group(self) -> str:
        """Cells that are compared with each other."""
        return f"{self.measure}/{self.modality}/{self.store}/w{self.workers}"

    def __str__(self) -> str:
        return f"{self.group}/{self.arm}"


def cells() -> list[Cell]:
    """All of them; the ceiling has no state, and no store but memory."""
    found = [
        Cell(name, modality, store, workers, arm)
        for name, (modalities, stores, counts) in CELLS.items()
        for modality in modalities
        for store in stores
        for workers in counts
        for arm in ARMS
    ]
    return [c for c in found if c.arm != "ceiling" or (c.measure != "kill" and c.store == "local")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cached = Path(tempfile.gettempdir()) / "millrace-peers"
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cells to measure")
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS), help="only these numbers of workers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the samples")
    parser.add_argument("--seed", type=int, default=0, help="of the order of arms and the moments of kills")
    parser.add_argument("--data", type=Path, default=cached / "data", help="where payloads are kept (3 GB)")
    parser.add_argument("--envs", type=Path, default=cached / "envs", help="where environments are kept (6 GB)")
    parser.add_argument("--list", action="store_true", help="print the cells")
    options = parser.parse_args()
    chosen = [
        c for c in cells() if c.workers in options.workers and any(fnmatch.fnmatch(str(c), p) for p in options.only)
    ]
    if options.list:
        print("\n".join(map(str, chosen)))
    elif not chosen:
        sys.exit(f"no cell is called {' or '.join(options.only)}; --list prints their names")
    else:
        _run(chosen, options)


def _run(chosen: list[Cell], options: argparse.Namespace) -> None:
    data = options.data / f"{_written_by()}-scale-{options.scale:g}"
    common.warn_if_busy()
    environment = common.environment()
    pythons = {arm: _python(arm, options.envs) for arm in {cell.arm for cell in chosen}}
    tokenizer = prepare_payloads(data, options, {cell.modality for cell in chosen})
    found: dict[str, list[dict[str, Any]]] = {str(cell): [] for cell in chosen}
    draw = random.Random(options.seed)
    with _object_server(data) as endpoint:
        _index(chosen, tokenizer, endpoint)
        for number in range(options.rounds):
            for place, cell in enumerate(_shuffled_in_groups(chosen, draw), 1):
                say(f"round {number + 1}/{options.rounds}, {place}/{len(chosen)}: {cell}")
                result = _measure(cell, pythons[cell.arm], tokenizer, endpoint, options.seed + number)
                found[str(cell)].append(result)
                if "error" in result:
                    warn(f"{cell}: {result['error']}")
            (options.data / "unfinished.json").write_text(json.dumps(found))  # a stopped run's rounds are not lost
    sizes = {m: payloads.count(m, options.scale) for m in payloads.SIZES}
    recorded = {key: value for key, value in vars(options).items() if not isinstance(value, Path)}
    report(found, {"environment": environment, "samples": sizes, "options": recorded})


def _written_by() -> str:
    """Hash of what makes payloads, so that those of another version are not taken for them."""
    return hashlib.sha256(b"".join(Path(m.__file__).read_bytes() for m in (payloads, write))).hexdigest()[:8]


def _python(arm: str, folder: Path) -> str:
    if arm.startswith("ours"):
        return sys.executable
    say(f"environment of {arm}")
    return str(environments.python(arm, folder))


def _index(chosen: list[Cell], tokenizer: Path, endpoint: str) -> None:
    """Make the manifests that our arms read."""
    for modality, store, arm in sorted({(c.modality, c.store, c.arm) for c in chosen if c.arm.startswith("ours")}):
        say(f"indexing {modality} for {arm}, {store}")
        with tempfile.TemporaryDirectory(prefix="peers-") as cache:
            job = _job(Cell("", modality, store, 0, arm), tokenizer, endpoint, cache)
            _python_module(sys.executable, "peers.arms.ours", json.dumps(asdict(job)))


def _shuffled_in_groups(chosen: list[Cell], draw: random.Random) -> Iterator[Cell]:
    groups: dict[str, list[Cell]] = {}
    for cell in chosen:
        groups.setdefault(cell.group, []).append(cell)
    for group in groups.values():
        yield from draw.sample(group, len(group))


def prepare_payloads(data: Path, options: argparse.Namespace, modalities: set[str]) -> Path:
    """Make what is missing below `data`; the path of the tokenizer."""
    data.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(data)
    for modality in (m for m in payloads.SIZES if m in modalities):
        folder = data / modality
        folder.mkdir(exist_ok=True)
        payloads.make_raw(modality, payloads.count(modality, options.scale), folder, tokenizer.encode)
        for kind, environment in write.WRITERS.items():
            if not (folder / kind).exists():
                say(f"writing {modality} as {kind}")
                python = environments.python(environment, options.envs) if environment else sys.executable
                _python_module(python, "peers.write", kind, str(folder))
    return data / "tokenizer" / "tokenizer.json"


def _tokenizer(data: Path) -> Tokenizer:
    folder = data / "tokenizer"
    if not folder.exists():
        train_bpe((payloads.text(sample).decode() for sample in range(4000)), VOCABULARY).save(folder)
    return load_tokenizer(folder)


def _python_module(python: Path | str, module: str, *arguments: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(measure.BENCHMARKS), "HOME": home, "TMPDIR": home}
        command = [str(python), "-m", module, *arguments]
        done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{module} {' '.join(arguments)} failed:\n{done.stderr}")


@contextlib.contextmanager
def _object_server(data: Path) -> Iterator[str]:
    env = os.environ | {"PYTHONPATH": str(measure.BENCHMARKS)}
    command = [sys.executable, "-m", "peers.server", str(data)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, preexec_fn=common.die_with_parent) as p:
        assert p.stdout is not None
        try:
            yield f"http://127.0.0.1:{p.stdout.readline().strip()}"
        finally:
            p.kill()


def _measure(cell: Cell, python: str, tokenizer: Path, endpoint: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="peers-") as cache:
        job = _job(cell, tokenizer, endpoint, cache)
        samples = job.samples
        _warm(Path(job.data) / cell.modality)
        arm = measure.Arm(job, python)
        if cell.measure == "order":
            return measure.order(arm)
        if cell.measure == "kill":
            return measure.kill(arm, seed)
        limit = min(samples, LIMITS.get(cell.modality, samples))
        return dict(measure.MEASURES[cell.measure](arm, limit))


def _job(cell: Cell, tokenizer: Path, endpoint: str, cache: str) -> Job:
    data = tokenizer.parent.parent
    return Job(
        arm=cell.arm, modality=cell.modality, data=str(data), cache=cache, tokenizer=str(tokenizer),
        endpoint=endpoint if cell.store == "server" else None, samples=len(payloads.Raw(data / cell.modality)),
        batch=BATCH[cell.modality], workers=cell.workers, seed=1234,
    )  # fmt: skip


def _warm(folder: Path) -> None:
    """Read the payload's files, so that they are in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                shutil.copyfileobj(file, _Sink(), 2**22)


class _Sink:
    def write(self, data: bytes) -> int:
        """Forget it."""
        return len(data)


def report(found: Mapping[str, list[dict[str, Any]]], result: dict[str, Any]) -> None:
    """One table per measure, the comparison with the best peer, and the JSON."""
    from peers import tables

    summary = {name: tables.summarise(rounds) for name, rounds in found.items()}
    result |= {"versions": _versions(found), "best_peer": tables.against_best_peer(summary)}
    result |= {"summary": summary, "cells": found}
    path = common.save("data_peers", result)
    for title, columns, rows in tables.tables(summary):
        show_table(title, columns, rows)
    columns = ["modality", "ours", "samples per CPU-s", "best peer", "samples per CPU-s", "ratio"]
    common.report(
        "Samples per CPU-second, local, the best number of workers of each", columns, tables.ratios(result), path
    )


def _versions(found: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of every arm's environment; taken out of the single results, where they are all alike."""
    versions: dict[str, Any] = {}
    for name, rounds in found.items():
        for one in rounds:
            if "versions" in one:
                versions[name.rpartition("/")[2]] = one.pop("versions")
            for resumed in one.get("resumed", ()):
                resumed.pop("versions", None)
    return versions


if __name__ == "__main__":
    main()
