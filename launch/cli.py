"""`millrace COMMAND …`. Heavy modules are imported by the command that needs them, so that --help is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from millrace import __version__
from millrace.core.errors import UserError, did_you_mean
from millrace.core.registry import load

# name -> (what it does, an example, where it is)
COMMANDS = {
    "prepare": (
        "turn files or a data set into a manifest, with a tokenizer",
        "millrace prepare books/ --out data/books",
        "millrace.launch.prepare:main",
    ),
    "data": (
        "index, curate, verify and look at data: stat, peek, simulate",
        "millrace data index s3://bucket/web/ --out data/web",
        "millrace.launch.data:main",
    ),
    "pretrain": (
        "train a model, or continue the run",
        "millrace pretrain configs/tiny.toml data.manifest=data/books train.duration='2k steps'",
        "millrace.launch.train:pretrain",
    ),
    "finetune": (
        "instruction tuning, LoRA or classification from a checkpoint",
        "millrace finetune configs/finetune_instruct.toml source=runs/tiny data.train=qa.jsonl",
        "millrace.launch.train:finetune",
    ),
    "eval": (
        "bits per byte and tasks, for any checkpoint",
        "millrace eval runs/tiny --text books/held_out.txt",
        "millrace.launch.eval:main",
    ),
    "generate": (
        "continue a prompt",
        "millrace generate runs/tiny --prompt 'Once upon a time'",
        "millrace.launch.generate:main",
    ),
    "export": (
        "write a folder that transformers loads",
        "millrace export runs/tiny exported/",
        "millrace.launch.export:main",
    ),
    "checkpoint": (
        "list, verify, inspect and remove checkpoints",
        "millrace checkpoint ls runs/tiny",
        "millrace.launch.checkpoint:main",
    ),
    "fork": (
        "start a branch of a run, from one of its steps",
        "millrace fork runs/tiny@1000 --name decay",
        "millrace.launch.fork:main",
    ),
    "submit": (
        "render and submit a Slurm job",
        "millrace submit configs/tiny.toml slurm.nodes=2 --dry-run",
        "millrace.launch.submit:main",
    ),
    "report": (
        "write report.html from a run's ledger",
        "millrace report runs/tiny",
        "millrace.launch.report:main",
    ),
    "config": (
        "print the resolved configuration, and what each key means",
        "millrace config configs/tiny.toml optim.lr=1e-3",
        "millrace.launch.config:main",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code (2 for a mistake in the command line itself)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(
            f"error: unknown command '{name}'{did_you_mean(name, COMMANDS) or '; see millrace --help'}", file=sys.stderr
        )
        return 2
    debug = "--debug" in rest
    if debug:
        os.environ["MILLRACE_DEBUG"] = "1"  # also for the ranks that the command starts
        rest.remove("--debug")
    return _run(COMMANDS[name][2], rest, debug)


def _run(target: str, arguments: list[str], debug: bool) -> int:
    try:
        return int(load(target)(arguments))
    except BrokenPipeError:  # `millrace config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as problem:
        if debug:
            raise
        from millrace.core.console import error

        error(str(problem))
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _help() -> str:
    lines = [
        f"millrace {__version__}: pretraining that never spills a sample",
        "",
        "usage: millrace COMMAND [arguments]     (millrace COMMAND --help for each; --debug shows tracebacks)",
        "",
    ]
    for name, (what, example, _) in COMMANDS.items():
        lines += [f"  {name:<10} {what}", f"            {example}"]
    lines += ["", "Every key of a configuration can be overridden: section.key=value. See docs/ for guides."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
