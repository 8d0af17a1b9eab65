"""Running a function as a whole process."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

BEGAN = time.time()  # of this process, but for what was imported before


def start_times() -> dict[str, float | None]:
    """When this process began and, where a batch script noted them, its job and the end of the job before; s."""
    job, before = (os.environ.get(f"MILLRACE_JOB_{name}") for name in ("BEGAN", "ENDED"))
    return {
        "began": BEGAN,
        "job_began": float(job) if job else None,
        "job_ended_before": float(before) if before else None,
    }


def run_process(main: Callable[[], int]) -> NoReturn:
    """Call `main` and end the process with its code, 1 on an exception; exit handlers run, but Python is not torn down.

    Threads of torch's process groups may outlive the group, for DeepSpeed keeps references to it. One that frees a
    tensor while Python is being torn down ends the process by SIGABRT, after a good run
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    code = [1]

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code[0])

    atexit.register(leave)  # what is registered first runs last
    code[0] = main()
    sys.exit(code[0])
