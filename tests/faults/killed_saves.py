"""Processes that write checkpoints and are killed: `python -m tests.faults.killed_saves FOLDER SEED KILLS`.

Each goes on from the newest checkpoint that verifies, keeps two, and writes until it is killed. Prints a line for each:
the step that it went on from, the last one that it said was visible, and what lay around when it was dead.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from millrace.engine.checkpoint.read import list_checkpoints, open_newest, remove_leftovers, verdict
from millrace.engine.checkpoint.retention import prune
from millrace.engine.config import CheckpointConfig
from tests.faults.saves import save


def write_on(folder: Path, pipe: int) -> None:
    """Save the next step, and the next, and tell which is visible."""
    remove_leftovers(folder)
    found, rejected = open_newest(folder)
    assert found is not None and not rejected
    step = found.step
    while True:
        os.write(pipe, f"{step}\n".encode())
        step += 1
        save(folder, step)
        prune(folder, CheckpointConfig(keep=2))


def main(folder: Path, seed: int, kills: int) -> None:
    draw, began = random.Random(seed), time.monotonic()
    save(folder, 1)
    longest = max(0.05, 3 * (time.monotonic() - began))  # on a busy machine a save takes as long as many
    for _ in range(kills):
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            write_on(folder, theirs)
        os.close(theirs)
        with os.fdopen(ours) as pipe:
            told = [int(pipe.readline())]  # it has begun
            time.sleep(draw.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            told += map(int, pipe.read().split())
        visible = [(int(path.name[5:]), verdict(path)) for path in list_checkpoints(folder)]
        torn = sum(1 for path in folder.iterdir() if ".tmp" in path.name)
        print(json.dumps({"from": told[0], "told": told[-1], "visible": visible, "torn": torn}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
