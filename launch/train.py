"""`millrace pretrain` and `millrace finetune`: this process is the launcher of its ranks."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from millrace.core.config import load_config
from millrace.core.registry import load
from millrace.core.rundir import RunDir
from millrace.launch.local import run_ranks
from millrace.pretrain.main import split_arguments

# command -> its configuration
CLASSES = {
    "pretrain": "millrace.pretrain.config:PretrainConfig",
    "finetune": "millrace.finetune.config:FinetuneConfig",
}

_USAGE = """usage: millrace {name} CONFIG.toml [section.key=value …] [--debug]

{what}
The run directory is run.dir/run.name; the same command continues it after any interruption.

example: {example}

`millrace config --for {name}` prints every key with its meaning. The same run starts from a launcher:
  torchrun --nproc_per_node 8 -m millrace.{name} CONFIG.toml …
  accelerate launch --config_file FILE -m millrace.{name} CONFIG.toml …
  srun python -m millrace.{name} CONFIG.toml …"""


def pretrain(argv: Sequence[str]) -> int:
    """`millrace pretrain`."""
    what = "Train a model on a prepared stream."
    return _start("pretrain", what, list(argv))


def finetune(argv: Sequence[str]) -> int:
    """`millrace finetune`."""
    what = "Fine-tune a checkpoint (ours, or a Hugging Face folder): instruction tuning, LoRA, classification."
    return _start("finetune", what, list(argv))


def _start(name: str, what: str, argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        from millrace.launch.cli import COMMANDS

        print(_USAGE.format(name=name, what=what, example=COMMANDS[name][1]))
        return 0 if argv else 2
    path, overrides, _ = split_arguments(argv)
    # Read it here first: a mistake is told once, at once, without starting ranks.
    config: Any = load_config(load(CLASSES[name]), path, overrides)
    processes = config.run.processes or _devices()
    started = time.time()
    code = run_ranks(f"millrace.{name}", argv, processes)
    # Ranks that were ended from outside cannot return their outcome: it is in the run directory.
    recorded = RunDir(Path(config.run.dir) / config.run.name).outcome_since(started)
    return recorded if code and recorded else code


def _devices() -> int:
    """GPUs of this machine, 1 without any; asked of the driver, since importing torch takes seconds."""
    import shutil
    import subprocess

    if shutil.which("nvidia-smi") is None:
        return 1
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return max(1, sum(line.startswith("GPU ") for line in listed.splitlines()))


if __name__ == "__main__":
    sys.exit(pretrain(sys.argv[1:]))
