"""The tiny corpus and configuration of the engine's tests, and runs with faults."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from millrace.core.ledger import read
from tests.engine.conftest import config_file, corpus, scenarios  # noqa: F401
from tests.ranks import launch_world

SETTINGS = ("run.sample_ids=true", "schedule.kind=constant", "schedule.warmup=0 steps", "eval.every=1000 steps")


@dataclass
class Run:
    """A run directory, and what the last start of it printed and returned, rank by rank."""

    path: Path
    codes: list[int]
    said: list[str]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [record for record in read(self.path / "ledger.jsonl") if record["event"] == name]

    def losses(self) -> dict[int, str]:
        return {record["step"]: record["loss_hex"] for record in self.events("step")}


class Runs:
    """Starts `pretrain` as so many ranks, with faults (see `inject.py`)."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.config, self.folder = config, folder

    def __call__(
        self, name: str, faults: list[dict[str, Any]], *overrides: str, world: int = 2, inside: tuple[str, ...] = ()
    ) -> Run:
        wanted = [f"run.dir={self.folder}", f"run.name={name}", *SETTINGS, *overrides]
        script = Path(__file__).with_name("inject.py")
        arguments = [json.dumps(faults), str(self.config), *wanted]
        codes, said = launch_world(script, world, arguments, timeout=240, inside=inside)
        return Run(self.folder / name, codes, said)


@pytest.fixture
def runs(config_file: Path, tmp_path: Path) -> Runs:  # noqa: F811
    return Runs(config_file, tmp_path)
