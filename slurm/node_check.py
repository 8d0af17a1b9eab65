"""A look at every node of a job before the run starts.

    python -m millrace.slurm.node_check look RUN HOST PORT [--first NODE --gpus G --seconds S]
    python -m millrace.slurm.node_check judge RUN NODE …

`look` runs on every node at once, as tasks of one srun: GPUs, disks, clock, and a sum with each other node in turn. It
leaves what it found in RUN/slurm/check/NODE.json. `judge` prints the bad ones among the nodes, separated by commas, and
tells why on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from millrace.core.console import warn
from millrace.slurm import node_parts
from millrace.slurm.node_verdict import Report, judge

_LEAST = 2.0  # seconds for the talk of one pair


def main(argv: Sequence[str]) -> int:
    """Look, or judge; see the module."""
    options = _parser().parse_args(list(argv))
    if options.kind == "judge":
        print(",".join(bad_nodes(options.run / "slurm" / "check", options.node)))
    else:
        Look(options).run()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m millrace.slurm.node_check", allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", required=True)
    look, env = kinds.add_parser("look", allow_abbrev=False), os.environ
    look.add_argument("run", type=Path)
    look.add_argument("host", help="address of the first node")
    look.add_argument("port", type=int, help="that is free there")
    look.add_argument("--first", default="the first node", help="its name")
    look.add_argument("--nodes", type=int, default=int(env.get("SLURM_STEP_NUM_NODES", 1)), help="how many look")
    look.add_argument("--number", type=int, default=int(env.get("SLURM_NODEID", 0)), help="of this node, from 0")
    look.add_argument("--name", default=env.get("SLURMD_NODENAME", "localhost"), help="of this node")
    look.add_argument("--gpus", type=int, default=0, help="of each node")
    look.add_argument("--seconds", type=float, default=60.0, help="for all of it")
    verdict = kinds.add_parser("judge", allow_abbrev=False)
    verdict.add_argument("run", type=Path)
    verdict.add_argument("node", nargs="+")
    return parser


def bad_nodes(folder: Path, nodes: Sequence[str]) -> list[str]:
    """Of `nodes`, by the reports in `folder`; why is told on stderr, a line each."""
    found = {path.stem: Report(**json.loads(path.read_text())) for path in folder.glob("*.json")}
    verdict = judge(nodes, {node: report for node, report in found.items() if node in nodes})
    for node, why in verdict.bad.items():
        warn(f"node {node} is left out: {why}")
    for why in verdict.unclear:
        warn(f"before the start: {why}")
    return list(verdict.bad)


def tournament(nodes: int) -> Iterator[list[tuple[int, int]]]:
    """Rounds in which every node meets every other once, each at most one other at a time (the circle method)."""
    circle: list[int | None] = [*range(nodes), *([None] if nodes % 2 else [])]
    for _ in range(len(circle) - 1):
        pairs = zip(circle[: len(circle) // 2], reversed(circle[len(circle) // 2 :]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        circle = [circle[0], circle[-1], *circle[1:-1]]


class Look:
    """One node's part."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._report = Report()
        self._until = time.monotonic() + options.seconds

    def run(self) -> None:
        """Everything, or what was done when the time is up: a device, a disk or a node may never answer."""
        limit = threading.Timer(self._options.seconds, self._give_up)
        limit.daemon = True
        limit.start()
        report, run = self._report, self._options.run
        report.own.append("a GPU or the temporary folder does not answer")
        report.own[:] = [*node_parts.gpus(self._options.gpus), *node_parts.disk(Path(tempfile.gettempdir()))]
        report.shared.append(f"{run} does not answer")
        report.shared[:] = list(node_parts.disk(run))
        if self._options.nodes > 1:
            try:
                self._meet()
            except (RuntimeError, ValueError) as error:
                report.pairs[self._options.first] = f"no rendezvous: {str(error).splitlines()[0]}"
        limit.cancel()
        self._write()

    def _give_up(self) -> None:
        self._write()
        os._exit(1)

    def _write(self) -> None:
        folder, name = self._options.run / "slurm" / "check", self._options.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".{name}").write_text(json.dumps(asdict(self._report)))
        os.replace(folder / f".{name}", folder / f"{name}.json")

    def _meet(self) -> None:
        """Talk with every node that arrives."""
        from torch.distributed import PrefixStore, TCPStore

        options, me = self._options, self._options.number
        half = timedelta(seconds=options.seconds / 2)
        store = TCPStore(options.host, options.port, None, me == 0, half, wait_for_workers=False)
        store.set(f"name{me}", options.name)
        names = self._roster(store, time.monotonic() + options.seconds / 2)
        rounds = list(tournament(options.nodes))
        began, each = time.monotonic(), max(_LEAST, (self._until - time.monotonic() - 2) / len(rounds))
        for number, pairs in enumerate(rounds):
            pair = next((p for p in pairs if me in p and all(str(node) in names for node in p)), None)
            if pair is None:
                continue
            # A round ends for all at one moment, so that who waited for a node that hangs is waited for in turn.
            left = began + (number + 1) * each - time.monotonic()
            device = "cuda:0" if options.gpus else "cpu"
            why = node_parts.talk(PrefixStore(f"{pair}", store), pair.index(me), left, device)
            if why:
                self._report.pairs[names[str(pair[1 - pair.index(me)])]] = why
        self._leave(store, names)

    def _roster(self, store: Any, until: float) -> dict[str, str]:
        """Number → name of the nodes that arrived, the same on all."""
        if self._options.number:
            return dict(json.loads(store.get("roster")))
        keys = {str(node): f"name{node}" for node in range(self._options.nodes)}
        while not store.check(list(keys.values())) and time.monotonic() < until:
            time.sleep(0.05)
        names = {node: store.get(key).decode() for node, key in keys.items() if store.check([key])}
        store.set("roster", json.dumps(names))
        return names

    def _leave(self, store: Any, names: dict[str, str]) -> None:
        """The first node's process holds the store that the others use."""
        store.set(f"done{self._options.number}", "")
        if self._options.number == 0:
            self._write()
            while not store.check([f"done{node}" for node in names]):
                time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
