"""`python -m millrace.finetune CONFIG [section.key=value …]`: one rank, for torchrun, accelerate launch and srun."""

from __future__ import annotations

import sys

from millrace.core.process import run_process
from millrace.finetune.config import FinetuneConfig
from millrace.pretrain.main import main_rank


def _run(config: FinetuneConfig) -> int:
    # Torch is imported only once the configuration is known to be right.
    from millrace.finetune.run import finetune

    return finetune(config)


if __name__ == "__main__":
    run_process(lambda: main_rank(FinetuneConfig, _run, sys.argv[1:]))
