"""bf16 where the hardware is fast at it."""

import pytest

from millrace.core.errors import UserError
from millrace.engine import precision


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
