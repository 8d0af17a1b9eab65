"""Save stall: how long training is held up by a save, of millrace, of DeepSpeed and of torch.distributed.checkpoint.

    python benchmarks/save_stall.py                                    # every size that fits, one rank
    python benchmarks/save_stall.py --sizes 10M 30M 100M --ranks 1 2 --rounds 2
    python benchmarks/save_stall.py --only 'millrace*' dcp-process

Every arm trains the same model in the same engine (ZeRO 2 in fp32, light steps of one row) and saves masters and two
moments, 12 bytes a parameter (DeepSpeed writes its weights, 4 bytes, besides). Measured are the seconds that the call
takes, the seconds by which the steps until the checkpoint is visible are longer than steps without a save (so that
work in the background which takes the cores is seen), the time until it is visible, its size, and the memory that the
rank and its helpers took above the peak of steps without a save. A round starts new processes, arms in random order; in
each process the first save is told apart, since it allocates what later ones use again.

The arms of DeepSpeed are its default and, with `--stage 0`, the one that it calls decoupled, with the writer `python`;
at ZeRO 1 and 2 (0.19.8) that cannot send the optimiser's tensors to its process ("Cowardly refusing to serialize
non-leaf tensor"). Its `fast` writer needs libaio, its DataStates engine a package that it does not come with. Those of
torch are `async_save` as it is by default, with a stager that is kept, and with that in shared memory and a process
that writes.

The last columns are facts: whether files and folders are flushed to the disk; what makes a checkpoint complete by
construction (one rename of the folder; DCP's folder is seen before, but its `.metadata` comes last; DeepSpeed's rank 0
writes `latest` without waiting for the other ranks, the decoupled one after it waited in the next optimiser step); and
whether a bit that flips is found.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import common
from common import fresh, quartiles
from save_arms import ARMS, FACTS, SIZES, measure

from millrace.core.console import say, warn

_LARGE = ("250M", "500M")
_COPY = 12.5  # bytes of memory a parameter, beside the engine's: at ZeRO 1 and 2 on one rank 24 with the flat gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2, help="of ZeRO")
    parser.add_argument("--rounds", type=int, help="of new processes; default 5, and 3 from 250M on")
    parser.add_argument("--only", nargs="+", default=["*"], help="names or patterns of arms: " + ", ".join(ARMS))
    parser.add_argument("--saves", type=int, default=4, help="in each process; the first is told apart")
    parser.add_argument("--seed", type=int, default=0, help="of the order of arms")
    parser.add_argument("--folder", help="where to write; default: the folder for temporary files")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        measure(json.loads(options.worker))
        return
    common.warn_if_busy()
    environment, chance = common.environment(), random.Random(options.seed)
    arms = [name for name in ARMS if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)]
    arms = [name for name in arms if name != "deepspeed-decoupled" or options.stage == 0]
    found: dict[str, list[dict[str, Any]]] = {}
    for size in options.sizes:
        for ranks in options.ranks:
            for number in range(options.rounds or (3 if size in _LARGE else 5)):
                for arm in chance.sample(arms, len(arms)):
                    say(f"{size}, {ranks} rank(s), round {number + 1}: {arm}")
                    name = f"{size}, {ranks} rank(s): {arm}"
                    found.setdefault(name, []).append(_measure(options, size, ranks, arm))
    _report(found, {"environment": environment, "options": vars(options), "facts": FACTS})


def _measure(options: argparse.Namespace, size: str, ranks: int, arm: str) -> dict[str, Any]:
    """One new group of processes."""
    free, wanted = _available(), (_COPY + (24 if options.stage else 16)) * 1e6 * int(size[:-1])
    if free < wanted:
        return {"error": f"needs about {wanted / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"}
    # A writer whose trainer was killed may still be at it.
    with tempfile.TemporaryDirectory(prefix="save-", dir=options.folder, ignore_cleanup_errors=True) as folder:
        job = {"arm": arm, "size": size, "ranks": ranks, "stage": options.stage, "folder": folder}
        job |= {"warmup": 3, "rest": 4, "saves": options.saves, "after": 3}
        return fresh(__file__, job, ranks)


def _available() -> int:
    with open("/proc/meminfo") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def figures(rounds: Sequence[Mapping[str, Any]], first: bool) -> dict[str, list[float]]:
    """Of every save (the `first` of each process, or the others): seconds blocked, extra and visible, and bytes.

    A step waits for the slowest rank, so the longest of the ranks counts. `extra` compares the steps until the save was
    visible with the median step without one of the same process.
    """
    found: dict[str, list[float]] = {"blocked": [], "extra": [], "stall": [], "visible": [], "bytes": []}
    for result in rounds:
        ranks = result["ranks"]
        for number in range(len(ranks[0]["saves"])):
            if first != (number == 0):
                continue
            saves = [rank["saves"][number] for rank in ranks]
            blocked = max(save["blocked"] for save in saves)
            extra = max(
                sum(save["steps"][: save["flying"]]) - save["flying"] * median(rank["rest"])
                for save, rank in zip(saves, ranks, strict=True)
            )
            visible = max(save["visible"] for save in saves)
            values = (blocked, extra, blocked + extra, visible, saves[0]["bytes"])
            for key, value in zip(found, values, strict=True):
                found[key].append(value)
    return found


def _report(found: dict[str, list[dict[str, Any]]], result: dict[str, Any]) -> None:
    rows, summary = [], {}
    for name, rounds in found.items():
        good = [r for r in rounds if "error" not in r]
        facts = FACTS[name.rpartition(": ")[2]]
        if not good:
            warn(f"{name}: {rounds[0]['error']}")
            rows.append((name, "failed", *[""] * 7, *facts))
            continue
        later, first = figures(good, False), figures(good, True)
        step = quartiles([seconds for r in good for seconds in r["ranks"][0]["rest"]])
        memory = median(max(rank["memory"] for rank in r["ranks"]) for r in good)
        summary[name] = {
            "later": {key: quartiles(values) for key, values in later.items() if values},
            "first": {key: median(values) for key, values in first.items()},
            "step": step,
            "memory": memory,
            "bytes_per_parameter": median(first["bytes"]) / good[0]["parameters"],
        }
        cells = [_cell(later[key]) for key in ("blocked", "extra", "stall", "visible")]
        size = f"{summary[name]['bytes_per_parameter']:.1f}"
        per = memory / good[0]["parameters"] * len(good[0]["ranks"])
        cells += [f"{median(first['stall']):.2f}", f"{step[1]:.2f}", size, f"{memory / 2**20:,.0f} ({per:.1f})"]
        rows.append((name, *cells, *facts))
    path = common.save("save_stall", result | {"summary": summary, "measurements": found})
    columns = ["seconds: median (quartiles)", "the call", "steps longer by", "stall", "visible after", "first stall"]
    columns += ["a step", "bytes/param.", "memory, MiB (bytes/param.)", "fsync", "whole, as shown by", "hash"]
    common.report("Save stall: call, and what the steps until it is visible are longer", columns, rows, path)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, middle, high = quartiles(values)
    return f"{middle:.3f} ({low:.3f}–{high:.3f})"


if __name__ == "__main__":
    main()
