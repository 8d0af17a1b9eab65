"""Step speed: the same model, batch and precision through millrace, transformers' Trainer and a bare PyTorch loop.

    python benchmarks/step_speed.py                          # every arm, three rounds, about 90 minutes on 2 cores
    python benchmarks/step_speed.py --arms 'bare-*' '*-z0-r1-*' --rounds 5
    python benchmarks/step_speed.py --profile millrace-z0-r1-compiled

A measurement is a fresh process: warm-up steps (compilation is among them), then `--steps` timed ones, from the end of
one step to the end of the next, so that data, bookkeeping and logging count. All arms train the same 13.8M-parameter
Qwen3 in fp32 on CPU (bf16 on GPUs) with fused AdamW and clipping at 1.0, on rows of one document each.
Arms: LOOP[-zSTAGE]-rRANKS-KIND, where the cores are divided among the ranks and the global batch is always the same.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
from common import fresh, interleave, quartiles

STAGES, KINDS = (0, 1, 2, 3), ("eager", "compiled")


def arms() -> dict[str, dict[str, Any]]:
    """Every arm by name."""
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        found[f"bare-r1-{kind}"] = {"loop": "bare", "ranks": 1}
        found[f"trainer-r1-{kind}"] = {"loop": "trainer", "ranks": 1}
        for ranks in (1, 2):
            for stage in STAGES:
                for loop in ("millrace", "trainer"):
                    found[f"{loop}-z{stage}-r{ranks}-{kind}"] = {"loop": loop, "ranks": ranks, "stage": stage}
    return {name: {**arm, "compile": name.endswith("compiled")} for name, arm in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=["*"], help="names or patterns of arms")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of all arms")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the arms")
    parser.add_argument("--profile", metavar="ARM", help="say where the time of one arm goes, instead")
    parser.add_argument("--list", action="store_true", help="print the names of the arms")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        import step_loops

        step_loops.measure(json.loads(options.worker))
    elif options.list:
        print("\n".join(arms()))
    else:
        _run(options)


def _run(options: argparse.Namespace) -> None:
    import step_model

    from millrace.engine.precision import choose_precision

    patterns = [options.profile] if options.profile else options.arms
    chosen = {name: arm for name, arm in arms().items() if any(fnmatch.fnmatch(name, p) for p in patterns)}
    if not chosen:
        sys.exit(f"no arm is called {' or '.join(patterns)}; --list prints their names")
    common.warn_if_busy()
    environment = common.environment()
    with tempfile.TemporaryDirectory() as folder:
        manifest = step_model.write_manifest(Path(folder), rows=256)
        fixed = {
            "manifest": str(manifest), "folder": folder, "warmup": options.warmup, "steps": options.steps,
            "precision": choose_precision(options.precision),
        }  # fmt: skip
        jobs = {name: {**arm, **fixed, "profile": bool(options.profile)} for name, arm in chosen.items()}
        if options.profile:
            found = fresh(__file__, jobs[options.profile], jobs[options.profile]["ranks"])
            print(found.get("error") or f"{found['profile']}\n{found['parts']}")
            return
        measured = interleave(
            {name: lambda job=job: fresh(__file__, job, job["ranks"]) for name, job in jobs.items()},  # type: ignore[misc]
            options.rounds,
            options.seed,
        )
    _report(measured, {"environment": environment, "model": step_model.SIZES, "options": vars(options)})


def _report(measured: dict[str, list[dict[str, Any]]], result: dict[str, Any]) -> None:
    """Table and JSON: tokens/s (median and quartiles over rounds), share of the matrix-product rate, ratio to bare."""
    good = {name: [m for m in found if "error" not in m] for name, found in measured.items()}
    rates = {name: quartiles([m["tokens_per_s"] for m in found]) for name, found in good.items() if found}
    # One rate for the whole run: the best that the machine showed in it.
    peak = max((m["matmul_flops"] for found in good.values() for m in found), default=0.0)
    rows = []
    for name in sorted(measured, key=lambda n: -rates.get(n, (0, 0, 0))[1]):
        if name not in rates:
            rows.append((name, "failed", "", "", "", ""))
            continue
        low, middle, high = rates[name]
        kind, ranks = name.rsplit("-", 1)[1], name.split("-r")[-1][0]
        against = [
            rates.get(f"bare-r1-{kind}"),
            rates.get(f"trainer{name[name.index('-') :]}") if name.startswith("millrace") else None,
        ]
        ratios = [f"{middle / other[1]:.3f}" if other else "" for other in against]
        share = good[name][0]["flops_per_token"] * middle / peak
        if ranks != "1":
            ratios[0] = ""  # the bare loop has one rank
        rows.append((name, f"{middle:,.0f}", f"{low:,.0f} – {high:,.0f}", f"{share:.1%}", *ratios))
    result |= {"matmul_flops": peak, "arms": measured, "tokens_per_s": rates}
    path = common.save("step_speed", result)
    title = f"Step speed; matrix products reach {peak / 1e9:.0f} GFLOP/s"
    columns = ["arm", "tokens/s", "quartiles", "utilisation", "of bare, same kind", "of Trainer, same arm"]
    common.report(title, columns, rows, path)


if __name__ == "__main__":
    main()
