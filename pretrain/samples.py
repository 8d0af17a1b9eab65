"""What a model in training shows of itself: entries for the ledger, and pictures and sounds beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millrace.core.rundir import RunDir

FOLDER = "samples"


def kept(rundir: RunDir, step: int, number: int, entry: Mapping[str, Any], *, main: bool) -> dict[str, Any]:
    """An entry for the ledger: `files`, bytes by name, are written below samples/ and become their paths by name."""
    found, files = dict(entry), {}
    for name, content in found.pop("files", {}).items():
        path = rundir.path / FOLDER / f"step-{step:08d}" / f"{number:02d}-{name}"
        files[name] = str(path.relative_to(rundir.path))
        if main:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return found | ({"files": files} if files else {})
