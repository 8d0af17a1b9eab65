"""A small model of books, alone and under a larger one that was trained on the same books.

    python benchmarks/distillation.py [BOOKS] [--steps 150] [--seeds 0] [--keep] [section.key=value …]

BOOKS is a folder of .txt files, cut and held out as in text_books.py. A model has the recipe of configs/text_books.toml
but for its size, which is 4 layers of 128 for the teacher and 2 layers of 64 for the students; all three take as many
steps, on the same samples in the same order. What is compared is bits per byte of the same 128 held-out rows, and the
share of the way from the student alone to the teacher that the taught student has gone. About 4 minutes on 2 cores for
each seed, by estimate; `--arms teacher`, and then all with --keep, does it in two parts.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

import books_corpus
import common
import text_books

from millrace.core.errors import DONE
from millrace.core.ledger import read
from millrace.core.rundir import RunDir
from millrace.launch.train import pretrain

_SIZES = {True: (4, 128), False: (2, 64)}  # (layers, width) of the teacher, and of the students
_VOCABULARY = 2048
ARMS = ("teacher", "alone", "taught")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rest", nargs="*", metavar="BOOKS | section.key=value")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--weight", type=float, default=0.9, help="of the teacher")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="fewer give no result, but runs")
    parser.add_argument("--keep", action="store_true", help="go on with what an earlier call has begun")
    parser.add_argument("--dir", type=Path, default=common.ROOT / "runs" / "distillation", help="where runs are kept")
    options = parser.parse_intermixed_args()
    overrides = [text for text in options.rest if "=" in text]
    folders = [text for text in options.rest if "=" not in text]
    books = Path(folders[0]) if folders else common.ROOT.parent / "shared" / "data" / "text_books_en"
    common.warn_if_busy()
    environment = common.environment()
    data = text_books.prepare_books(books_corpus.write_corpus(books, options.dir / "text"), options.dir, _VOCABULARY)
    given = [*(f"{key}={value}" for key, value in data.items()), *overrides]
    runs = {seed: {arm: _train(arm, seed, options, given) for arm in options.arms} for seed in options.seeds}
    if set(options.arms) == set(ARMS):
        taught = {"weight": options.weight, "temperature": options.temperature}
        _report(runs, {"environment": environment, "overrides": overrides, "steps": options.steps, **taught})


def _train(arm: str, seed: int, options: argparse.Namespace, given: list[str]) -> dict[str, Any]:
    run = options.dir / f"{arm}-{seed}"
    if options.keep and RunDir(run).outcome_since(0) == DONE:
        return _summary(read(run / "ledger.jsonl"))
    if not options.keep:
        shutil.rmtree(run, ignore_errors=True)
    layers, width = _SIZES[arm == "teacher"]
    own = [
        f"model.config={{num_hidden_layers={layers}, hidden_size={width}, intermediate_size={11 * width // 4}, "
        f"num_attention_heads={width // 32}, num_key_value_heads={width // 32}, head_dim=32, tie_word_embeddings=true}}"
    ]
    if arm == "taught":
        own += ["objective.kind=distillation", f"objective.teacher={options.dir / f'teacher-{seed}'}"]
        own += [f"objective.weight={options.weight}", f"objective.temperature={options.temperature}"]
    common_part = [
        f"run.dir={options.dir}", f"run.name={run.name}", f"run.seed={seed}", f"train.duration={options.steps} steps",
        "eval.every=100 steps", "eval.rows=128", "engine.compile=false",
    ]  # fmt: skip
    code = pretrain([str(common.ROOT / "configs" / "text_books.toml"), *own, *common_part, *given])
    if code:
        raise SystemExit(f"the run {run.name} ended with exit code {code}; see {run}")
    return _summary(read(run / "ledger.jsonl"))


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [r for r in records if r["event"] == "step"]
    evals = [r for r in records if r["event"] == "eval"]
    start = next(r for r in records if r["event"] == "start")
    return {
        "bits_per_byte": evals[-1]["bpb"],
        "curve": [{"step": r["step"], "bits_per_byte": r["bpb"]} for r in evals],
        "heldout_bytes": evals[-1]["bytes"],
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens_total"],
        "seconds": sum(r["seconds"] for r in steps),
        "params": start["params"],
        "world": start["world"],
    }


def _report(runs: dict[int, dict[str, dict[str, Any]]], result: dict[str, Any]) -> None:
    closed = {}
    for seed, run in runs.items():
        teacher, alone, taught = (run[arm]["bits_per_byte"] for arm in ARMS)
        closed[seed] = (alone - taught) / (alone - teacher)
    path = common.save("distillation", result | {"runs": runs, "gap_closed": closed})
    rows = [
        (seed, *(f"{run[arm]['bits_per_byte']:.4f}" for arm in ARMS), f"{closed[seed]:.0%}",
         " / ".join(f"{run[arm]['seconds']:.0f}" for arm in ARMS))
        for seed, run in runs.items()
    ]  # fmt: skip
    rows.append(("median", "", "", "", f"{statistics.median(closed.values()):.0%}", ""))
    titles = ["seed", "teacher", "student alone", "student taught", "gap closed", "seconds"]
    common.report("Bits per byte of the held-out text", titles, rows, path)


if __name__ == "__main__":
    main()
