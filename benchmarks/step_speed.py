"""Step speed: the same model, batch and precision through millrace, transformers' Trainer and a bare PyTorch loop.

    python benchmarks/step_speed.py                          # every group, about three hours on 2 cores
    python benchmarks/step_speed.py --groups 'z0-r1-*' 'z?-r2-compiled' --rounds 3
    python benchmarks/step_speed.py --profile millrace-z0-r1-compiled

A group compares arms of one ZeRO stage, number of ranks and kind (zSTAGE-rRANKS-KIND), for example z2-r1-compiled:
bare-r1-compiled, trainer-z2-r1-compiled and millrace-z2-r1-compiled. All processes of a group are alive at once and
take turns of a few steps each in random order, so that a ratio compares seconds that lie beside each other, whatever
else the machine does. Turns follow warm-up steps (compilation is among them) and last from the end of one step to the
end of another, so that data, bookkeeping and logging count. A round starts the processes anew.

All arms train the same 13.8M-parameter Qwen3 in one precision with fused AdamW and clipping at 1.0, on rows of one
document each. The cores are divided among the ranks; the global batch is always the same.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
from common import Workers, quartiles, take_turns

from millrace.core.console import say, warn

STAGES, KINDS = (0, 1, 2, 3), ("eager", "compiled")
Group = dict[str, dict[str, Any]]


def groups() -> dict[str, Group]:
    """Every group by name: its arms by name."""
    found: dict[str, Group] = {}
    for kind in KINDS:
        for ranks in (1, 2):
            for stage in STAGES:
                suffix = f"z{stage}-r{ranks}-{kind}"
                arms = {
                    f"{loop}-{suffix}": {"loop": loop, "ranks": ranks, "stage": stage}
                    for loop in ("millrace", "trainer")
                }
                if ranks == 1:
                    arms[f"bare-r1-{kind}"] = {"loop": "bare", "ranks": 1}
                if ranks == 1 and stage == 0:
                    arms[f"trainer-r1-{kind}"] = {"loop": "trainer", "ranks": 1}
                found[suffix] = {name: {**arm, "compile": kind == "compiled"} for name, arm in arms.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", default=["*"], help="names or patterns of groups")
    parser.add_argument("--rounds", type=int, default=2, help="times that every group's processes are started")
    parser.add_argument("--warmup", type=int, default=4, help="steps that are not timed")
    parser.add_argument("--turns", type=int, default=8, help="turns of each arm in a round")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of all arms")
    parser.add_argument("--seed", type=int, default=0, help="of the order of turns")
    parser.add_argument("--profile", metavar="ARM", help="say where the time of one arm goes, instead")
    parser.add_argument("--list", action="store_true", help="print the names of the groups and their arms")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        import step_loops

        step_loops.measure(json.loads(options.worker))
    elif options.list:
        print("\n".join(f"{name}: {' '.join(arms)}" for name, arms in groups().items()))
    else:
        _run(options)


def _run(options: argparse.Namespace) -> None:
    import step_model

    from millrace.engine.precision import choose_precision

    chosen = {name: arms for name, arms in groups().items() if any(fnmatch.fnmatch(name, p) for p in options.groups)}
    if options.profile:
        chosen = {
            name: {options.profile: arms[options.profile]} for name, arms in chosen.items() if options.profile in arms
        }
    if not chosen:
        sys.exit(
            f"no group or arm is called {options.profile or ' or '.join(options.groups)}; --list prints their names"
        )
    common.warn_if_busy()
    environment = common.environment()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as folder:
        fixed = {
            "manifest": str(step_model.write_manifest(Path(folder), rows=256)), "folder": folder,
            "warmup": options.warmup, "steps": options.steps, "turns": options.turns,
            "precision": choose_precision(options.precision), "profile": bool(options.profile),
        }  # fmt: skip
        for number in range(options.rounds):
            for place, (name, arms) in enumerate(chosen.items(), 1):
                say(f"round {number + 1}/{options.rounds}, {place}/{len(chosen)}: {name}")
                jobs = {arm: {**job, **fixed} for arm, job in arms.items()}
                found[name].append(_measure(jobs, options.turns, options.seed + number))
                if options.profile:
                    (result,) = found[name][-1]["arms"].values()
                    print(result.get("error") or f"{result['profile']}\n{result['parts']}")
                    return
    _report(found, {"environment": environment, "model": step_model.SIZES, "options": vars(options)})


def _measure(jobs: Group, turns: int, seed: int) -> dict[str, Any]:
    """One round of a group: seconds of every turn by arm, and what each arm's rank 0 says of itself."""
    with contextlib.ExitStack() as stack:
        arms, ready = {}, {}
        for name, job in jobs.items():  # one after the other: compilation takes all cores
            arms[name] = stack.enter_context(Workers(__file__, job, job["ranks"]))
            if arms[name].ready() is not None:
                ready[name] = arms[name]
        seconds = take_turns(ready, turns, seed)
        for workers in arms.values():
            workers.go()
        results = {name: workers.result() for name, workers in arms.items()}
    for name, result in results.items():
        if "error" in result:
            warn(f"{name}: {result['error']}")
    return {"turns": seconds, "arms": results}


def _report(found: dict[str, list[dict[str, Any]]], result: dict[str, Any]) -> None:
    """Tables and JSON: tokens/s, share of the matrix-product rate, and ratios of turns beside each other."""
    tokens = _tokens_of_a_turn(result["options"]["steps"])
    summary: dict[str, dict[str, Any]] = {}
    rows = []
    # One rate for the whole run: the best that the machine showed in it.
    told = [arm for rounds in found.values() for r in rounds for arm in r["arms"].values() if "error" not in arm]
    peak = max((arm["matmul_flops"] for arm in told), default=0.0)
    for group, rounds in found.items():
        turns = [turn for r in rounds for turn in r["turns"]]
        for name in sorted({name for turn in turns for name in turn}):
            rate = quartiles([tokens / turn[name] for turn in turns if name in turn])
            against = {
                other: quartiles([turn[other] / turn[name] for turn in turns if name in turn and other in turn])
                for other in rounds[0]["arms"]
                if other != name and any(name in turn and other in turn for turn in turns)
            }
            summary[f"{group}: {name}"] = {"tokens_per_s": rate, "against": against}
            share = told[0]["flops_per_token"] * rate[1] / peak
            bare = next((other for other in against if other.startswith("bare")), "")
            trainer = name.replace("millrace", "trainer") if name.startswith("millrace") else ""
            ratios = [_ratio(against.get(other)) for other in (bare, trainer)]
            rows.append((name, f"{rate[1]:,.0f}", f"{rate[0]:,.0f} – {rate[2]:,.0f}", f"{share:.1%}", *ratios))
    result |= {"matmul_flops": peak, "summary": summary, "groups": found}
    path = common.save("step_speed", result)
    title = f"Step speed; matrix products reach {peak / 1e9:.0f} GFLOP/s; ratios: median (quartiles) of turns"
    columns = ["arm", "tokens/s", "quartiles", "utilisation", "of bare", "of Trainer, same DeepSpeed"]
    common.report(title, columns, rows, path)


def _tokens_of_a_turn(steps: int) -> int:
    from step_model import LENGTH, ROWS

    return steps * ROWS * LENGTH


def _ratio(values: tuple[float, float, float] | None) -> str:
    return f"{values[1]:.3f} ({values[0]:.3f} – {values[2]:.3f})" if values else ""


if __name__ == "__main__":
    main()
