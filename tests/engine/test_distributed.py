"""Ranks that would train differently are refused, on every rank."""

from __future__ import annotations

from typing import Any

import pytest

from millrace.core.errors import UserError
from millrace.engine.distributed import World, check_alike


class Told(World):
    """A world whose ranks said what they were told to."""

    def gather_objects(self, item: Any) -> list[Any]:
        return [{"bf16": {"enabled": True}, "gradient_clipping": 1.0}, item]


def world(rank: int) -> Told:
    return Told(rank, 2, None, None)  # type: ignore[arg-type]


def test_ranks_with_equal_settings_start() -> None:
    check_alike(world(1), {"gradient_clipping": 1.0, "bf16": {"enabled": True}})


def test_nodes_with_other_hardware_are_named() -> None:
    with pytest.raises(UserError, match="rank 1 would train with another bf16 than rank 0; .* set engine.precision"):
        check_alike(world(0), {"gradient_clipping": 1.0})
