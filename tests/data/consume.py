"""Run by test_exactly_once: consumes a stream on all ranks of a world, a line for each step, until it is killed.

Usage: consume.py JOB.json. The file `out` holds what was consumed so far; the last whole line says where to go on.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from millrace.data.config import DataConfig, MixtureConfig
from millrace.data.loader import build_loader
from millrace.data.state import LoaderState


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    done = Path(job["out"]).read_text() if os.path.exists(job["out"]) else ""
    lines = [json.loads(line) for line in done.split("\n")[:-1]]
    state = LoaderState.from_dict(lines[-1]["state"]) if lines else None
    values = job["config"] | {"mixture": MixtureConfig(**job["config"].get("mixture", {}))}
    config = DataConfig(**values, workers=job["workers"])
    world, micro = job["world"], job["rows"] // job["world"]
    loaders = [
        build_loader(config, seed=7, batch_rows=job["rows"], micro_batch=micro, rank=rank, world=world, state=state)
        for rank in range(world)
    ]
    out = os.open(job["out"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.ftruncate(out, sum(len(json.dumps(line)) + 1 for line in lines))  # a line that the kill cut short
    for _ in range(len(lines), job["steps"]):
        batches = [next(loader) for loader in loaders]
        built = [span for b in batches for m in b.micro_batches for row in m.spans for span in row]
        record = {"planned": batches[0].spans, "built": built, "state": batches[0].state.to_dict()}
        os.write(out, json.dumps(record).encode() + b"\n")
    for loader in loaders:
        loader.close()


if __name__ == "__main__":
    main(sys.argv[1])
