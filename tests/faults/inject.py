"""One rank with faults: `python inject.py FAULTS CONFIG [section.key=value …]`, otherwise `millrace.pretrain`.

FAULTS is a JSON list. Each entry names its kind (a function below), the ranks (absent: all) and the steps at which it
happens, and what the kind needs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from millrace.core.process import run_process
from millrace.data.loader import Loader
from millrace.data.stores import remote
from millrace.data.stores.waiting import Patience
from millrace.engine.checkpoint import download, saver, write
from millrace.engine.checkpoint.upload import Uploader
from millrace.engine.distributed import World
from millrace.engine.engine import Engine
from millrace.pretrain import loop, uploads
from millrace.pretrain import run as pretrain_run
from millrace.pretrain.config import PretrainConfig
from millrace.pretrain.main import main_rank

NOW = {"step": 0}  # the step under way


def due(fault: dict[str, Any]) -> bool:
    """Whether this is the rank and the step of a fault."""
    return int(os.environ["RANK"]) in fault.get("ranks", (int(os.environ["RANK"]),)) and NOW["step"] in fault["steps"]


def loss(fault: dict[str, Any]) -> None:
    """The loss, and with it the gradient, is multiplied by `factor` (a number, "nan" or "inf")."""
    forward = Engine.forward

    def faulty(self: Any, micro: Any) -> Any:
        nll, metrics = forward(self, micro)
        factor = float(fault["factor"]) if due(fault) else 1.0
        return nll * factor, metrics * factor

    Engine.forward = faulty  # type: ignore[method-assign]


SITES: dict[str, tuple[Any, str]] = {
    "forward": (Engine, "forward"),
    "all-reduce": (World, "sum"),
    "optimiser": (Engine, "step"),
    "save": (write, "write_tensors"),
    "commit": (write, "fsync_folder"),
}


def send(fault: dict[str, Any]) -> None:
    """The process sends itself a signal (by name), once, where a function of `SITES` begins."""
    place, name = SITES[fault["at"]]
    real = getattr(place, name)

    def faulty(*arguments: Any) -> Any:
        if due(fault) and not fault.get("sent"):  # a second Ctrl-C would interrupt at once
            fault["sent"] = True
            os.kill(os.getpid(), getattr(signal, fault["signal"]))
        return real(*arguments)

    setattr(place, name, faulty)


def never_reads(fault: dict[str, Any]) -> None:
    """The batch of a step never comes."""
    read = Loader.__next__

    def faulty(self: Any) -> Any:
        NOW["step"] += 1  # the step that begins
        if due(fault):
            time.sleep(3600)
        NOW["step"] -= 1
        return read(self)

    Loader.__next__ = faulty  # type: ignore[method-assign]


def leaves_out_a_sum(fault: dict[str, Any]) -> None:
    """The rank goes on without the second of a step's control sums."""
    add = World.sum

    def faulty(self: Any, *values: float) -> list[float]:
        return [1.0] * len(values) if due(fault) and len(values) == 3 else add(self, *values)

    World.sum = faulty  # type: ignore[method-assign]


def decides_alone(fault: dict[str, Any]) -> None:
    """What a step is judged by is the rank's own, not the sum over all ranks."""
    add = World.sum

    def faulty(self: Any, *values: float) -> list[float]:
        summed = add(self, *values)
        return list(values) if due(fault) and len(values) == 3 else summed

    World.sum = faulty  # type: ignore[method-assign]


def slow(fault: dict[str, Any]) -> None:
    """Forward passes take longer by so many seconds."""
    forward = Engine.forward

    def faulty(self: Any, micro: Any) -> Any:
        if due(fault):
            time.sleep(fault["seconds"])
        return forward(self, micro)

    Engine.forward = faulty  # type: ignore[method-assign]


def slow_disk(fault: dict[str, Any]) -> None:
    """Writing a rank's part of a checkpoint takes longer by so many seconds, once it has begun."""
    real = saver.write_rank

    def faulty(temporary: Path, content: Any) -> None:
        temporary.mkdir(parents=True, exist_ok=True)
        time.sleep(fault["seconds"])
        real(temporary, content)

    saver.write_rank = faulty


def flip(fault: dict[str, Any]) -> None:
    """One bit of one weight turns over as the step begins."""
    forward = Engine.forward

    def faulty(self: Any, micro: Any) -> Any:
        if due(fault) and not fault.get("done"):
            fault["done"] = True
            with torch.no_grad():
                weight = next(iter(self.module.parameters()))
                weight.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << fault["bit"])
        return forward(self, micro)

    Engine.forward = faulty  # type: ignore[method-assign]


def impatient(fault: dict[str, Any]) -> None:
    """Stores, of checkpoints and of data, are given up after so many seconds."""
    patience = Patience(stall=fault["seconds"] / 2, deadline=fault["seconds"], unknown=fault["seconds"])
    uploads.Uploader = partial(Uploader, patience=patience)  # type: ignore[misc,assignment]
    download._ASK_SECONDS = fault["seconds"]
    remote.ObjectBlob.__init__.__defaults__ = (patience,)  # type: ignore[misc]


KINDS = {
    "loss": loss,
    "signal": send,
    "read": never_reads,
    "sum": leaves_out_a_sum,
    "alone": decides_alone,
    "slow": slow,
    "disk": slow_disk,
    "flip": flip,
    "impatient": impatient,
}


def count_steps() -> None:
    """Keep `NOW`."""
    fit, accumulate = pretrain_run.fit, loop.accumulate

    def counted_fit(parts: Any) -> int:
        NOW["step"] = parts.point.step
        return fit(parts)

    def counted_accumulate(*arguments: Any) -> Any:
        NOW["step"] += 1
        return accumulate(*arguments)

    pretrain_run.fit, loop.accumulate = counted_fit, counted_accumulate


def main() -> int:
    count_steps()
    for fault in json.loads(sys.argv[1]):
        KINDS[fault["kind"]](fault)
    return main_rank(PretrainConfig, pretrain_run.pretrain, sys.argv[2:])


if __name__ == "__main__":
    run_process(main)
