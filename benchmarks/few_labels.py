"""Handwritten digits with four labels of each class: FixMatch against learning from the same labels alone.

    python benchmarks/few_labels.py [--seeds 0 1 2] [--keep] [--dir FOLDER] [section.key=value …]

The first 9,000 images of MNIST's t10k have no label, but for 40 that a seed chooses; the last 1,000 are held out. Both
arms run configs/few_labels.toml (overrides are passed on) for as many steps, on the same samples in the same order; the
second has objective.weight = 0. Accuracies are those of the running mean of the weights, at the end. About 15 minutes
on 2 cores, estimated from single steps.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import common
import corpora

from millrace.core.errors import DONE
from millrace.core.ledger import read
from millrace.core.rundir import RunDir
from millrace.data.prepare import PrepareConfig, prepare
from millrace.launch.train import pretrain

ARMS = {"consistency": 1.0, "labels alone": 0.0}  # weight of what has no label
EACH = 4  # labels of a class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", action="store_true", help="go on with what an earlier call has begun")
    parser.add_argument("--dir", type=Path, default=common.ROOT / "runs" / "few_labels", help="where runs are kept")
    options = parser.parse_intermixed_args()
    common.warn_if_busy()
    environment = common.environment()
    paths = corpora.write("mnist", options.dir / "mnist")
    runs = {}
    for seed in options.seeds:
        data = _prepare(paths, options.dir / f"labels-{seed}", seed)
        runs[seed] = {arm: _train(arm, seed, data, options) for arm in ARMS}
    _report(runs, {"environment": environment, "overrides": options.overrides})


def choose(labels: list[int], seed: int) -> list[int]:
    """Places of `EACH` samples of every class, ascending."""
    places = defaultdict(list)
    for place, label in enumerate(labels):
        places[label].append(place)
    draw = random.Random(seed)
    return sorted(place for label in sorted(places) for place in draw.sample(places[label], EACH))


def _prepare(paths: dict[str, Path], folder: Path, seed: int) -> dict[str, str]:
    """Overrides that name the manifests."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(paths["train"], columns=["image", "text", "label"])
    few = table.take(choose(table["label"].to_pylist(), seed))
    none = table.set_column(1, "text", pa.array([""] * len(table)))
    for name, part in (("labelled", few), ("unlabelled", none)):
        pq.write_table(part, folder / f"{name}.parquet", row_group_size=256)
    sources = {name: folder / f"{name}.parquet" for name in ("labelled", "unlabelled")} | {"heldout": paths["heldout"]}
    for name, path in sources.items():
        words = {} if name == "labelled" else {"tokenizer": str(folder / "labelled" / "tokenizer")}
        out, given = str(folder / name), [f"{name}={path}"]
        prepare(PrepareConfig(inputs=given, out=out, image="image", text="text", vocab_size=300, **words))
    both = [str(folder / name) for name in ("labelled", "unlabelled")]
    return {"data.manifest": repr(both), "data.heldout": str(folder / "heldout")}


def _train(arm: str, seed: int, data: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    name = f"{arm.replace(' ', '-')}-{seed}"
    run = options.dir / name
    if options.keep and RunDir(run).outcome_since(0) == DONE:
        return _summary(read(run / "ledger.jsonl"))
    if not options.keep:
        shutil.rmtree(run, ignore_errors=True)
    given = data | {"run.dir": options.dir, "run.name": name, "run.seed": seed, "objective.weight": ARMS[arm]}
    recipe = str(common.ROOT / "configs" / "few_labels.toml")
    code = pretrain([recipe, *(f"{key}={value}" for key, value in given.items()), *options.overrides])
    if code:
        raise SystemExit(f"the run {name} ended with exit code {code}; see {run}")
    return _summary(read(run / "ledger.jsonl"))


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [r for r in records if r["event"] == "step"]
    evals = [r for r in records if r["event"] == "eval"]
    kept = ("step", "loss", "accuracy")
    return {
        "accuracy": evals[-1]["accuracy"],
        "steps": steps[-1]["step"],
        "seconds": sum(r["seconds"] for r in steps),
        "curve": [{name: r[name] for name in kept} for r in evals],
        "confident": statistics.mean(r["figures"].get("confident", 0.0) for r in steps[-50:]),
        "params": next(r for r in records if r["event"] == "start")["params"],
        "world": next(r for r in records if r["event"] == "start")["world"],
    }


def _report(runs: dict[int, dict[str, dict[str, Any]]], result: dict[str, Any]) -> None:
    first, second = ARMS
    gains = [run[first]["accuracy"] - run[second]["accuracy"] for run in runs.values()]
    summary = {"gain_points": [100 * gain for gain in gains], "gain_points_median": 100 * statistics.median(gains)}
    path = common.save("few_labels", result | {"runs": runs, **summary})
    rows = [
        (seed, *(f"{run[arm]['accuracy']:.1%}" for arm in ARMS), f"{100 * gain:+.1f}", f"{run[first]['seconds']:.0f}")
        for (seed, run), gain in zip(runs.items(), gains, strict=True)
    ]
    rows.append(("median", *(f"{statistics.median(r[a]['accuracy'] for r in runs.values()):.1%}" for a in ARMS),
                 f"{summary['gain_points_median']:+.1f}", ""))  # fmt: skip
    common.report("Held-out accuracy with 40 labels", ["seed", *ARMS, "points", "seconds"], rows, path)


if __name__ == "__main__":
    main()
