"""Half an hour of random faults: millrace beside transformers' Trainer with Accelerate and DeepSpeed's own checkpoints.

    python benchmarks/soak.py                            # two arms of 30 minutes, one after the other
    python benchmarks/soak.py --minutes 4 --gap 10 20 --arms millrace
    python benchmarks/soak.py --list                     # the faults that the seed draws

Both arms train the same 4.3M-parameter Qwen3 on two ranks of gloo at ZeRO 2 in fp32, on the same rows, with a
checkpoint every 20 steps, under the same supervisor. That starts the job again at once whenever it is over, as a batch
system with requeue does; ends it when it has taken no step for `--deadline` seconds (millrace's own watchdog is
quicker, the Trainer has none, and gloo's time limit is 30 minutes); and after three starts on end that took no step
removes the newest checkpoint, as an engineer would, and counts an intervention.

Faults come in the order and with the pauses that the seed draws. The clock of the pauses stands still while a job
does not train or has fewer than two checkpoints, so every fault meets a job that trains and could fall back, and an arm
that is down for longer meets fewer of them.

Goodput is the time of the steps whose updates are in the last weights, as a share of the wall time. Samples lost and
repeated are those of that effective stream, beside the stream of a run that is never interrupted: of millrace from its
ledger, of the Trainer from the samples that its training steps were given. `trainer-jit` is the Trainer with
enable_jit_checkpoint, which saves on SIGTERM.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
from faulty import account, arms, corpus, reference
from faulty.plan import KINDS, draw
from faulty.supervise import Soak

from millrace.core.console import say
from millrace.core.ledger import read

_ROWS = {
    "goodput": "goodput", "faults": "faults met", "seconds_lost_per_fault": "seconds lost, a fault",
    "restarts": "restarts", "steps": "steps that count",
    "steps_per_minute": "steps that count, a minute", "step_seconds": "median step, s",
    "recomputed_steps": "steps computed again", "samples_lost": "samples lost", "samples_repeated": "samples repeated",
    "samples_computed_again": "samples computed again", "steps_not_taken": "steps not taken (guard)",
    "steps_poisoned": "steps with weights that a NaN got into", "interventions": "interventions by hand",
    "restarts_from_zero": "silent restarts from step 0", "damaged_loaded": "damaged checkpoints loaded",
    "hangs_ended_by_deadline": "hangs that the supervisor ended", "orphans": "processes left behind",
    "ended_by_itself": "ended by itself", "final_loss": "loss at the end",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of each arm")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--arms", nargs="+", choices=list(arms.ARMS), default=["millrace", "trainer"])
    parser.add_argument("--gap", type=float, nargs=2, default=[30.0, 60.0], help="seconds of training between faults")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds without a step after which a job hangs")
    parser.add_argument("--folder", type=Path, help="keep runs and outputs here instead of a temporary folder")
    parser.add_argument("--list", action="store_true", help="print the first faults of the seed")
    options = parser.parse_args()
    if options.list:
        for kind, what in KINDS.items():
            print(f"{kind}: {what}")
        for fault in itertools.islice(draw(options.seed, tuple(options.gap), arms.RANKS), 24):
            print(f"{fault.number:3d} after {fault.after:5.1f} s: {fault.kind}, rank {fault.rank}")
        return
    common.warn_if_busy()
    environment = common.environment()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        found = {name: _measure(name, options, folder) for name in options.arms}
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    kept = {name: str(value) for name, value in vars(options).items() if name != "folder"}
    _report(found, {"environment": environment, "options": kept})


def _measure(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one arm, then list the stream that it should have seen."""
    text = folder / "corpus"
    if not (text / "rows.npy").exists():
        say("preparing the text")
        text.mkdir(parents=True)
        corpus.write(text)
    settings = arms.Settings(folder, text, options.every, options.grace)
    arm = arms.ARMS[name](settings, name)
    if arm.folder.exists():
        sys.exit(f"{arm.folder} holds an earlier soak, which would be continued; name another --folder")
    faults = draw(options.seed, tuple(options.gap), arms.RANKS)
    history = Soak(arm, faults, 60 * options.minutes, options.deadline).run()
    ours = name == "millrace"
    records = read(arm.ledger) if ours else account.merge(reference.logs(arm))
    count = max((record["step"] for record in records if record["event"] == "step"), default=0)
    say(f"{name}: listing the samples of {count} steps that nobody interrupts")
    expected = (
        reference.ours(text, count)
        if ours
        else reference.trainer(arms.trainer(settings, f"{name}-order", order=max(count, 1)))
    )
    return {"figures": account.figures(records, history, expected), "history": asdict(history)}


def _report(found: dict[str, dict[str, Any]], result: dict[str, Any]) -> None:
    path = common.save("soak", result | {"arms": found})
    made = {name: arm["figures"] for name, arm in found.items()}
    rows = [(label, *(_cell(key, arm[key]) for arm in made.values())) for key, label in _ROWS.items()]
    for kind in KINDS:
        recovered = [arm["recovery_seconds"].get(kind) for arm in made.values()]
        rows.append((f"recovery: {kind}, s", *("" if s is None else f"{s:.1f}" for s in recovered)))
    common.report(f"{result['options']['minutes']} minutes of faults", ["", *made], rows, path)


def _cell(key: str, value: Any) -> str:
    if key == "goodput":
        return f"{value:.1%}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
