"""Every objective: the same losses at every ZeRO stage and on one rank and two, and exact resume."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from millrace.core.config import load_config
from millrace.data.tokenizer import load_tokenizer
from millrace.engine.checkpoint.read import open_verified
from millrace.pretrain.config import PretrainConfig
from tests.engine.conftest import close
from tests.handmade import small_model, write_checkpoint

_SMALL = ["model.config.hidden_size=32", "model.config.num_hidden_layers=2", "model.config.num_attention_heads=2"]
_ALONE = 'data.rows="alone"'
_RECURRENT_GEMMA = [
    'model.kind="recurrent_gemma"', *_SMALL, "model.config.num_key_value_heads=1", "model.config.num_hidden_layers=3",
    "model.config.lru_width=32", "model.config.intermediate_size=64",
]  # fmt: skip
_MAMBA2 = [
    'model.kind="mamba2"', "model.config.hidden_size=32", "model.config.num_hidden_layers=2",
    "model.config.num_heads=4", "model.config.head_dim=16", "model.config.state_size=16", "model.config.n_groups=1",
    "model.config.chunk_size=32",
]  # fmt: skip
OBJECTIVES = {
    "causal_lm": [],
    "causal_lm, alone": [_ALONE],
    "distillation": ['objective.kind="distillation"', 'objective.teacher="TEACHER"', "objective.weight=0.3"],
    "masked_lm": ['objective.kind="masked_lm"', 'model.kind="bert"', *_SMALL, "model.config.intermediate_size=64"],
    "masked_lm, alone": [
        'objective.kind="masked_lm"', 'model.kind="modernbert"', *_SMALL, "model.config.intermediate_size=64", _ALONE,
    ],
    "span_corruption": [
        'objective.kind="span_corruption"', 'model.kind="t5"', *_SMALL, "model.config.d_ff=64", "model.config.d_kv=16",
        _ALONE,
    ],
    "recurrent_gemma": _RECURRENT_GEMMA,
    "recurrent_gemma, alone": [*_RECURRENT_GEMMA, _ALONE],
    "mamba2": _MAMBA2,
    "mamba2, alone": [*_MAMBA2, _ALONE],
    "mamba2, autocast": [*_MAMBA2, "engine.precision=autocast"],
    "recurrent_gemma, autocast": [*_RECURRENT_GEMMA, "engine.precision=autocast"],
    "lstm": ['model.kind="lstm"', "model.config.hidden_size=32"],
    "lstm, alone": ['model.kind="lstm"', "model.config.hidden_size=32", _ALONE],
}  # fmt: skip
QUICK = ("masked_lm", "span_corruption", "lstm", "distillation")  # in every run of the tests; the others take minutes
STEPS, HALF = 20, 8
STAGES = {f"zero{stage}": [f"engine.zero_stage={stage}"] for stage in range(4)}


def overrides(objective: str, stage: str, teacher: Path) -> list[str]:
    # `model.kind` clears its section, so it comes first; the corpus's model is a qwen3.
    chosen = [text.replace("TEACHER", str(teacher)) for text in OBJECTIVES[objective]]
    kinds = [o for o in chosen if o.startswith(("model.kind", "objective.kind"))]
    return [*kinds, *(o for o in chosen if o not in kinds), *STAGES[stage]]


class Found:
    """Results by (world, "OBJECTIVE STAGE HOW"), of some objectives at some stages."""

    def __init__(self, scenarios: Any, folder: Path, objectives: Sequence[str], stages: Sequence[str]) -> None:
        self.folder, self.stages, self.results, teacher = folder, stages, {}, folder / "teacher"
        corpus = load_config(PretrainConfig, scenarios.config).data.manifest
        write_checkpoint(teacher / "checkpoints", small_model(), load_tokenizer(Path(str(corpus)) / "tokenizer"))
        for world in (1, 2):
            jobs: list[dict[str, Any]] = []
            for objective, stage in product(objectives, stages):
                name, common = f"{objective} {stage}", {"overrides": overrides(objective, stage, teacher)}
                if world == 1 and stage != "zero0" and objectives == QUICK:
                    continue
                jobs.append({"name": f"{name} whole", **common, "steps": STEPS, "digest": True})
                if world == 2 and stage in ("zero0", "zero3"):
                    saved = str(folder / name.replace(" ", "-"))
                    jobs.append({"name": f"{name} half", **common, "steps": HALF, "save": saved})
                    load = f"{saved}/step-{HALF:08d}"
                    jobs.append({"name": f"{name} rest", **common, "steps": STEPS - HALF, "load": load})
            self.results |= {(world, name): result for name, result in scenarios(world, jobs, timeout=900).items()}

    def check(self, objective: str) -> None:
        """It learns, the same at every stage and on any ranks, and resumes to the bit."""
        first = self.results[1, f"{objective} zero0 whole"]
        losses = [float.fromhex(loss) for loss in first["losses"]]
        assert sum(losses[-5:]) < 0.98 * sum(losses[:5])
        others = [(key, r) for key, r in self.results.items() if key[1].startswith(objective + " zero")]
        wholes = [other for (_, name), other in others if name.endswith("whole")]
        assert len(wholes) >= 3
        for other in wholes:
            assert other["loaded"] == first["loaded"], "equal first weights"
            assert (other["targets"], other["spans"]) == (first["targets"], first["spans"])
            assert close(other["losses"], first["losses"]) < 1e-4
        for stage in ("zero0", "zero3"):
            whole, half, rest = (self.results[2, f"{objective} {stage} {how}"] for how in ("whole", "half", "rest"))
            assert half["losses"] + rest["losses"] == whole["losses"]
            assert (rest["loaded"], rest["after"]) == (half["after"], whole["after"])


@pytest.fixture(scope="module")
def quick(scenarios: Any, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(scenarios, tmp_path_factory.mktemp("quick"), QUICK, ("zero0", "zero3"))


@pytest.fixture(scope="module")
def found(scenarios: Any, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Found(scenarios, tmp_path_factory.mktemp("objectives"), list(OBJECTIVES), list(STAGES))


@pytest.mark.parametrize("objective", QUICK)
def test_without_and_with_sharding(quick: Found, objective: str) -> None:
    quick.check(objective)


@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_at_every_stage(found: Found, objective: str) -> None:
    found.check(objective)


def test_no_checkpoint_holds_the_teacher(quick: Found) -> None:
    for stage in ("zero0", "zero3"):
        saved = open_verified(quick.folder / f"distillation-{stage}" / f"step-{HALF:08d}")
        assert list(saved.fixed()) == ["teacher_sha256"]
        assert all(name.startswith("model.") for name in saved.manifest["params"])
