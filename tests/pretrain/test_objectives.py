"""Every objective: the same losses at every ZeRO stage and on one rank and two, and exact resume."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.conftest import close

_SMALL = ["model.config.hidden_size=32", "model.config.num_hidden_layers=2", "model.config.num_attention_heads=2"]
_ALONE = 'data.rows="alone"'
OBJECTIVES = {
    "causal_lm": [],
    "causal_lm, alone": [_ALONE],
    "masked_lm": ['objective.kind="masked_lm"', 'model.kind="bert"', *_SMALL, "model.config.intermediate_size=64"],
    "masked_lm, alone": [
        'objective.kind="masked_lm"', 'model.kind="modernbert"', *_SMALL, "model.config.intermediate_size=64", _ALONE,
    ],
    "span_corruption": [
        'objective.kind="span_corruption"', 'model.kind="t5"', *_SMALL, "model.config.d_ff=64", "model.config.d_kv=16",
        _ALONE,
    ],
    "recurrent_gemma": [
        'model.kind="recurrent_gemma"', *_SMALL, "model.config.num_key_value_heads=1",
        "model.config.num_hidden_layers=3", "model.config.lru_width=32", "model.config.intermediate_size=64", _ALONE,
    ],
    "lstm": ['model.kind="lstm"', "model.config.hidden_size=32", _ALONE],
    "mamba2": [
        'model.kind="mamba2"', "model.config.hidden_size=32", "model.config.num_hidden_layers=2",
        "model.config.num_heads=4", "model.config.head_dim=16", "model.config.state_size=16", "model.config.n_groups=1",
        "model.config.chunk_size=32", _ALONE,
    ],
}  # fmt: skip
STEPS, HALF = 20, 8
STAGES = {f"zero{stage}": [f"engine.zero_stage={stage}"] for stage in range(4)}


def overrides(objective: str, stage: str) -> list[str]:
    # `model.kind` clears its section, so it comes first; the corpus's model is a qwen3.
    chosen = OBJECTIVES[objective]
    kinds = [o for o in chosen if o.startswith(("model.kind", "objective.kind"))]
    return [*kinds, *(o for o in chosen if o not in kinds), *STAGES[stage]]


@pytest.fixture(scope="module")
def found(scenarios: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Any]:
    """(world, "OBJECTIVE STAGE HOW") → result."""
    folder = tmp_path_factory.mktemp("objectives")
    results = {}
    for world in (1, 2):
        jobs: list[dict[str, Any]] = []
        for objective in OBJECTIVES:
            for stage in STAGES:
                name, common = f"{objective} {stage}", {"overrides": overrides(objective, stage)}
                jobs.append({"name": f"{name} whole", **common, "steps": STEPS, "digest": True})
                if world == 2 and stage in ("zero0", "zero3"):
                    saved = str(folder / name.replace(" ", "-"))
                    jobs.append({"name": f"{name} half", **common, "steps": HALF, "save": saved})
                    load = f"{saved}/step-{HALF:08d}"
                    jobs.append({"name": f"{name} rest", **common, "steps": STEPS - HALF, "load": load})
        results |= {(world, name): result for name, result in scenarios(world, jobs, timeout=600).items()}
    return results


@pytest.mark.parametrize("objective", OBJECTIVES)
class TestEveryObjective:
    def test_learns(self, found: Any, objective: str) -> None:
        losses = [float.fromhex(loss) for loss in found[1, f"{objective} zero0 whole"]["losses"]]
        assert sum(losses[-5:]) < 0.98 * sum(losses[:5])

    def test_the_same_at_every_stage_and_on_any_ranks(self, found: Any, objective: str) -> None:
        first = found[1, f"{objective} zero0 whole"]
        for world in (1, 2):
            for stage in STAGES:
                other = found[world, f"{objective} {stage} whole"]
                assert other["loaded"] == first["loaded"], "equal first weights"
                assert (other["targets"], other["spans"]) == (first["targets"], first["spans"])
                assert close(other["losses"], first["losses"]) < 1e-4

    @pytest.mark.parametrize("stage", ["zero0", "zero3"])
    def test_resumes_to_the_bit(self, found: Any, objective: str, stage: str) -> None:
        whole, half, rest = (found[2, f"{objective} {stage} {how}"] for how in ("whole", "half", "rest"))
        assert half["losses"] + rest["losses"] == whole["losses"]
        assert (rest["loaded"], rest["after"]) == (half["after"], whole["after"])
