"""One rank of the fine-tuning tests: runs configurations one after another.

Arguments: a JSON file with a list of lists of overrides.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from millrace.core.config import load_config
from millrace.engine.distributed import leave_world
from millrace.finetune import run
from millrace.finetune.config import FinetuneConfig


def main(path: str) -> None:
    run.leave_world = lambda: None  # one process group for all: DeepSpeed does not survive a second one
    for overrides in json.loads(Path(path).read_text()):
        AcceleratorState._reset_state(reset_partial_state=True)
        outcome = run.finetune(load_config(FinetuneConfig, None, overrides))
        assert outcome == 0, overrides
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
