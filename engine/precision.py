"""Choosing the precision from the hardware."""

from __future__ import annotations

import os

import torch

from millrace.core.errors import UserError


def choose_precision(wanted: str, *, fp32_weights: bool = False) -> str:
    """`"fp32"` or `"bf16"` for `"auto"`; other values pass through. Where weights must not be rounded, `"autocast"` is
    the way of bf16: products in bf16, while weights, gradients and what they are summed in stay fp32.

    bf16 is chosen on GPUs with bf16 tensor cores (compute capability 8.0 and later) and on CPUs with bf16
    instructions (AMX or AVX-512 BF16: matrix products 4 times as fast as in fp32 on a Zen 5); a CPU without them
    multiplies bf16 matrices several times slower than fp32 ones. `accelerate launch` with mixed_precision: bf16
    decides for "auto".

    Raises:
        UserError: Accelerate was told to use fp16, which needs loss scaling that millrace does not do.
    """
    found = _for_hardware() if wanted == "auto" else wanted
    return "autocast" if found == "bf16" and fp32_weights else found


def _for_hardware() -> str:
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", "bf16"):
        raise UserError(f"Accelerate's mixed_precision is {launcher}; millrace trains in bf16 or fp32, set it to one")
    if launcher == "bf16":
        return "bf16"
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp32"
    return "bf16" if _cpu_flags() & {"amx_bf16", "avx512_bf16"} else "fp32"


def _cpu_flags() -> set[str]:
    """What Linux tells of the first processor; nothing elsewhere."""
    try:
        with open("/proc/cpuinfo") as file:
            return set(next((line for line in file if line.startswith("flags")), "").split())
    except OSError:
        return set()
