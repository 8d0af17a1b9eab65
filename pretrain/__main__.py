"""`python -m millrace.pretrain CONFIG [section.key=value …]`: one rank, for torchrun, accelerate launch and srun."""

from __future__ import annotations

import sys

from millrace.core.process import run_process
from millrace.pretrain.config import PretrainConfig
from millrace.pretrain.main import main_rank


def _run(config: PretrainConfig) -> int:
    # Torch is imported only once the configuration is known to be right.
    from millrace.pretrain.run import pretrain

    return pretrain(config)


if __name__ == "__main__":
    run_process(lambda: main_rank(PretrainConfig, _run, sys.argv[1:]))
