from __future__ import annotations

import os
from pathlib import Path

import pytest

from millrace.data.stores import local


def test_a_blob_that_is_dropped_at_the_very_end_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a process ends, the names of its modules are emptied before the last objects are dropped."""
    (tmp_path / "x").write_text("x")
    blob = local.LocalBlob(str(tmp_path / "x"))
    fd = blob._fd
    monkeypatch.setattr(local, "os", None)
    blob.__del__()
    with pytest.raises(OSError):
        os.fstat(fd)
