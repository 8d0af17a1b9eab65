"""Build DeepSpeed's operators into the virtual environment: `python -m millrace.launch.build_ops [BUILDER …]`.

`make` calls it. Without it the first run would compile for a minute, in every rank's start.
"""

from __future__ import annotations

import os
import sys
import time

from millrace.core.console import say, warn
from millrace.engine.ops import VARIABLE, find_ninja, prebuilt_folder, remove_stale_locks

# cpu_adam is for DeepSpeed configurations that offload the optimiser with DeepSpeed's own Adam.
BUILDERS = ("ShareMemCommBuilder", "CPUAdamBuilder")


def build(names: tuple[str, ...] = BUILDERS) -> list[str]:
    """Build those that this machine can; return the names of the operators that are ready.

    One that cannot be built is named with the reason, and is no error: runs work without it, with gloo's collectives
    and torch's Adam.
    """
    folder = prebuilt_folder()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[VARIABLE] = str(folder)
    remove_stale_locks(folder)
    find_ninja()
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    os.environ.setdefault("DS_ACCELERATOR", _accelerator())
    from deepspeed.accelerator import get_accelerator

    ready = []
    for name in names:
        builder = get_accelerator().create_op_builder(name)
        if builder is None:
            continue  # the accelerator has no use for it
        began = time.monotonic()
        if not any(folder.glob(f"**/{builder.NAME}.so")):
            say(f"compiling DeepSpeed's {builder.NAME}: one to three minutes")
        try:
            builder.load(verbose=False)
        except Exception as error:  # whatever a compiler, a loader or DeepSpeed's checks may say
            warn(f"DeepSpeed's {builder.NAME} cannot be built here: {str(error).strip().splitlines()[0]}")
            continue
        say(f"DeepSpeed's {builder.NAME} is ready in {folder} ({time.monotonic() - began:.0f} s)")
        ready.append(builder.NAME)
    return ready


def _accelerator() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    build(tuple(sys.argv[1:]) or BUILDERS)
