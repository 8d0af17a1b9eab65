"""A checkpoint of a small model, opened once."""

from __future__ import annotations

from pathlib import Path

import pytest

from millrace.eval.subject import Subject, open_subject
from tests.handmade import small_model, write_checkpoint

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint of two ranks; 64 positions."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_checkpoint(folder / "checkpoints", small_model("qwen3"))
    return folder


@pytest.fixture(scope="session")
def subject(run: Path) -> Subject:
    return open_subject(run, dtype="fp32")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data sets, where the machine has them."""
    if not SHARED.is_dir():
        pytest.skip(f"no data sets in {SHARED}")
    return SHARED
