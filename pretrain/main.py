"""One rank's process: configuration in, outcome out, errors without a traceback unless --debug is given."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from millrace.core.config import load_config
from millrace.core.console import error
from millrace.core.errors import CONTINUE, DONE, PeerLost, UserError

FAILED = 1
_LESS_MEMORY = (
    "lower train.micro_batch, raise engine.zero_stage, or set engine.activation_checkpointing or "
    "engine.offload_optimizer; in a batch job, look at its memory limit"
)


def split_arguments(argv: Sequence[str]) -> tuple[str | None, list[str], bool]:
    """(configuration file, overrides, debug) of `[CONFIG.toml] [section.key=value …] [--debug]`.

    Raises:
        UserError: more than one file, or an unknown flag.
    """
    flags = [a for a in argv if a.startswith("-")]
    overrides = [a for a in argv if "=" in a and not a.startswith("-")]
    files = [a for a in argv if "=" not in a and not a.startswith("-")]
    unknown = [f for f in flags if f != "--debug"]
    if unknown:
        raise UserError(f"unknown flag {unknown[0]}; options are written section.key=value, and --debug")
    if len(files) > 1:
        raise UserError(f"give one configuration file, not {', '.join(files)}")
    return (files[0] if files else None), overrides, "--debug" in flags


def main_rank(cls: type[Any], run: Callable[[Any], int], argv: Sequence[str]) -> int:
    """Read the configuration, call `run` and return the process's exit code."""
    debug = "--debug" in argv or bool(os.environ.get("MILLRACE_DEBUG"))
    _die_with_parent()
    try:
        path, overrides, _ = split_arguments(argv)
        return _exit_code(run(load_config(cls, path, overrides)))
    except (UserError, OSError) as problem:
        if debug:
            raise
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        if rank == "0" or isinstance(problem, PeerLost):
            error(str(problem))
        return FAILED
    except (MemoryError, RuntimeError) as problem:
        if debug or not _out_of_memory(problem):
            raise
        where = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
        first = next(iter(str(problem).splitlines()), "no memory could be allocated")
        error(f"{where} is out of memory: {first}\n{_LESS_MEMORY}")
        return FAILED
    except KeyboardInterrupt:
        error("interrupted; the last checkpoint stands, start again to continue")
        return 130


def _out_of_memory(problem: BaseException) -> bool:
    """Torch has a class of its own for accelerators; on the CPU it raises a plain RuntimeError."""
    return isinstance(problem, MemoryError) or (
        type(problem).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(problem)
    )


def _exit_code(outcome: int) -> int:
    """Launchers turn any child's code into 1 and end its siblings: there outcome.json says "continue me"."""
    return DONE if "TORCHELASTIC_RUN_ID" in os.environ and outcome == CONTINUE else outcome


def _die_with_parent() -> None:
    """Ask Linux for SIGTERM when the launcher dies, so that its SIGKILL leaves no rank behind."""
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
