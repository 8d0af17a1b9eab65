"""Objectives on samples at every ZeRO stage, on one rank and two."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_world

STAGES = {f"zero{stage}": {"stage": stage} for stage in range(4)} | {"zero3-thr0": {"stage": 3, "threshold": 0}}
STEPS, HALF = 20, 8


class Found:
    """Results by "KIND WORLD STAGE HOW", of some kinds at some stages."""

    def __init__(
        self,
        folder: Path,
        kinds: Mapping[str, dict[str, Any]],
        stages: Iterable[str],
        more: Sequence[dict[str, Any]] = (),
    ) -> None:
        """`kinds` are the sections of each; `more` are scenarios of two ranks."""
        self.folder, self.stages = folder, list(stages)
        self.results: dict[str, Any] = {}
        for world in (1, 2):
            jobs: list[dict[str, Any]] = []
            for kind, stage in product(kinds, self.stages):
                name, common = f"{kind} {world} {stage}", {**kinds[kind], **STAGES[stage], "micro": 4 // (3 - world)}
                if world == 1 and stage != "zero0":
                    continue
                jobs.append({"name": f"{name} whole", **common, "steps": STEPS})
                if world == 2 and stage in ("zero0", "zero3"):
                    saved = str(folder / name.replace(" ", "-"))
                    jobs.append({"name": f"{name} half", **common, "steps": HALF, "save": saved})
                    load = f"{saved}/step-{HALF:08d}"
                    jobs.append({"name": f"{name} rest", **common, "steps": STEPS, "first": HALF, "load": load})
            if world == 2:
                jobs += [{"micro": 4, "steps": STEPS, **job} for job in more]
            path = folder / f"{world}.json"
            path.write_text(json.dumps({"scenarios": jobs}))
            out = run_world(Path(__file__).with_name("samples_worker.py"), world, [str(path)], timeout=500)
            line = next(line for line in out.splitlines() if line.startswith("RESULT "))
            self.results |= {r["name"]: r for r in json.loads(line[7:])}

    def check(self, kind: str, steps: int = STEPS) -> None:
        """The same at every stage and on any ranks and micro-batches, and resumes to the bit.

        `steps` are compared: nearest codes and absolute values have kinks, where rounding decides on which side a step
        goes on, and then Adam carries the difference further. What is resumed has no such excuse.
        """
        first = self.results[f"{kind} 1 zero0 whole"]
        losses = [step[0] for step in first["found"]][:steps]
        for stage in self.stages:
            other = self.results[f"{kind} 2 {stage} whole"]
            assert other["loaded"] == first["loaded"], "equal first weights"
            assert [step[0] for step in other["found"]][:steps] == pytest.approx(losses, rel=1e-4)
            few = [torch.tensor(result["found"][: min(steps, HALF)]) for result in (other, first)]
            torch.testing.assert_close(*few, rtol=1e-3, atol=1e-5)  # every figure, and the gradient
        for stage in ("zero0", "zero3"):
            whole, half, rest = (self.results[f"{kind} 2 {stage} {how}"] for how in ("whole", "half", "rest"))
            assert half["found"] + rest["found"] == whole["found"]
            assert (rest["loaded"], rest["after"]) == (half["after"], whole["after"])

    def checkpoint(self, kind: str, stage: str) -> Path:
        """What two ranks saved after `HALF` steps."""
        return self.folder / f"{kind} 2 {stage}".replace(" ", "-") / f"step-{HALF:08d}"

    def losses(self, kind: str) -> list[float]:
        """Of one rank without sharding."""
        return [step[0] for step in self.results[f"{kind} 1 zero0 whole"]["found"]]
