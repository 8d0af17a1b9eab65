"""One rank of the fine-tuning tests: runs configurations one after another.

Arguments: a JSON file with a list of lists of overrides; the file for the messages of those that are refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from millrace.core.config import load_config
from millrace.core.errors import UserError
from millrace.core.process import run_process
from millrace.engine.distributed import leave_world
from millrace.finetune import run
from millrace.finetune.config import FinetuneConfig


def main(path: str, out: str) -> int:
    run.leave_world = lambda: None  # one process group for all: DeepSpeed does not survive a second one
    refused = {}
    for overrides in json.loads(Path(path).read_text()):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = load_config(FinetuneConfig, None, overrides)
        try:
            outcome = run.finetune(config)
            assert outcome == 0, overrides
        except UserError as error:
            refused[config.run.name] = str(error)
    Path(out).write_text(json.dumps(refused))
    leave_world()
    return 0


if __name__ == "__main__":
    run_process(lambda: main(*sys.argv[1:]))
