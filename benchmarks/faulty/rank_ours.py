"""A rank of our arm: `millrace.pretrain`, which takes orders."""

from __future__ import annotations

import sys
from typing import Any

from faulty.orders import Orders
from millrace.core.process import run_process
from millrace.engine.checkpoint.saver import Saver
from millrace.engine.engine import Engine
from millrace.pretrain.config import PretrainConfig
from millrace.pretrain.main import main_rank
from millrace.pretrain.run import pretrain


def obey(orders: Orders) -> None:
    """Losses and saves ask for orders first."""
    forward, begin = Engine.forward, Saver.begin

    def faulty_forward(self: Any, micro: Any) -> Any:
        nll, metrics = forward(self, micro)
        return (nll * float("nan"), metrics * float("nan")) if orders.take("nan") else (nll, metrics)

    def faulty_begin(self: Any, step: int, extra: dict[str, Any]) -> None:
        orders.take("kill in save")  # the supervisor sees it and kills
        begin(self, step, extra)

    Engine.forward, Saver.begin = faulty_forward, faulty_begin  # type: ignore[method-assign]


def main() -> int:
    obey(Orders())
    return main_rank(PretrainConfig, pretrain, sys.argv[1:])


if __name__ == "__main__":
    run_process(main)
