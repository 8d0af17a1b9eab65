"""Run by test_faults in place of `millrace.data.worker`: the same, with the patience that the first argument gives."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from millrace.data import worker
from millrace.data.stores import waiting


def hurry(patience: Mapping[str, float]) -> None:
    """Let all stores of this process wait as long as `patience` says, and name reads that take 0.3 s."""
    for name, seconds in patience.items():
        object.__setattr__(waiting.PATIENCE, name, seconds)
    waiting.stalls.__defaults__ = (0.3,)
    worker._REPORT_EVERY = 0.2


if __name__ == "__main__":
    hurry(json.loads(sys.argv[1]))
    sys.exit(worker.main())
