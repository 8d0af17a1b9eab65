"""bf16 where the hardware is fast at it."""

import pytest

from millrace.core.errors import UserError
from millrace.engine import precision
from millrace.engine.config import EngineConfig
from millrace.engine.zero import deepspeed_config
from millrace.models.bridge import needs_fp32
from millrace.models.config import ModelConfig


@pytest.mark.parametrize(
    ("flags", "chosen"), [({"avx512f"}, "fp32"), ({"amx_bf16"}, "bf16"), ({"avx512_bf16"}, "bf16"), (set(), "fp32")]
)
def test_a_cpu_with_bf16_instructions_takes_bf16(monkeypatch, flags, chosen):
    monkeypatch.setattr(precision.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "_cpu_flags", lambda: flags)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert precision.choose_precision("auto") == chosen
    assert precision.choose_precision("fp32") == "fp32"


def test_accelerates_choice_decides_auto(monkeypatch):
    monkeypatch.setattr(precision, "_cpu_flags", lambda: set())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert precision.choose_precision("auto") == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="fp16; millrace trains in bf16 or fp32"):
        precision.choose_precision("auto")


def test_bf16_leaves_weights_alone_that_must_not_be_rounded():
    assert precision.choose_precision("bf16", fp32_weights=True) == "autocast"
    assert precision.choose_precision("bf16") == "bf16"
    assert precision.choose_precision("fp32", fp32_weights=True) == "fp32"
    for kind, needs in (("mamba2", True), ("recurrent_gemma", True), ("qwen3", False), ("opt", False)):
        assert needs_fp32(ModelConfig(kind=kind)) == needs


@pytest.mark.parametrize("stage", range(4))
def test_autocast_is_deepspeeds_with_nothing_sent_in_bf16(stage):
    made = deepspeed_config(EngineConfig(zero_stage=stage), "autocast", micro_batch=1, accumulation=1, clip=1.0)
    assert made["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert "bf16" not in made and "data_types" not in made
