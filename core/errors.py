"""Errors that name what was wrong, where, and how to mend it; and the outcomes a run can have."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

# Exit codes of a run, read by batch scripts (see docs/slurm.md).
DONE = 0
CONTINUE = 75
STOP = 93


class UserError(ValueError):
    """A mistake that the user can mend; the command line shows its message without a traceback."""


class PeerLost(UserError):
    """Another rank ended; every rank that notices says so."""


def is_missing_path(name: str) -> bool:
    """Whether `name`, of which there is no folder, was meant as a path rather than as a hub's OWNER/NAME."""
    path = Path(name)
    inside = path.parent != Path() and path.parent.is_dir()
    return not path.exists() and (name.count("/") > 1 or name.startswith((".", "/", "~")) or inside)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'momentum'?"` for the closest of `choices`, or an empty string."""
    close = difflib.get_close_matches(str(word), [str(c) for c in choices], n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
