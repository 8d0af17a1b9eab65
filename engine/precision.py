"""Choosing the precision from the hardware."""

from __future__ import annotations

import torch


def choose_precision(wanted: str) -> str:
    """`"fp32"` or `"bf16"` for `"auto"`; other values pass through.

    bf16 is chosen on GPUs with bf16 tensor cores (compute capability 8.0 and later) and on CPUs with AMX; a CPU
    without AMX multiplies bf16 matrices several times slower than fp32 ones.
    """
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp32"
    return "bf16" if _has_amx() else "fp32"


def _has_amx() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return "amx_bf16" in file.read()
    except OSError:
        return False
