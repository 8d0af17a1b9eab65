"""Settings of all tests."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

STARTERS = {"run_world", "launch_world", "Found"}  # names of a module, and fixtures, that start ranks
FIXTURES = {"scenarios", "runs"}
# Begun first, or at the end one of two waits for the other.
LONG = ("tests/slurm/test_local_", "tests/house/test_contributing", "tests/data/test_faults", "tests/house/test_style")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what may start several ranks: they use two cores, and wait for each other without sleeping."""
    for item in items:
        names = vars(item.module).keys() if isinstance(item, pytest.Function) else set()
        if STARTERS & names or FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("ranks")
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))
