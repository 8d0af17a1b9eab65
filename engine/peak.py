"""The rate of matrix products that model-FLOPs utilisation is measured against."""

from __future__ import annotations

import time

import torch

# Dense bf16 peak in FLOP/s by name of the device, from the vendors' data sheets.
_DATASHEET = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of one rank: the data sheet's for known GPUs in bf16, else measured in a fraction of a second.

    A CPU has no useful data sheet (threads, clocks and neighbours decide), so utilisation there is the share of the
    matrix-product rate measured at the start of the run, with all ranks measuring at once.
    """
    low = precision in ("bf16", "autocast")
    if device.type == "cuda" and low:
        name = torch.cuda.get_device_name(device)
        for key, value in _DATASHEET.items():
            if key in name:
                return value
    return measure_matmul(device, torch.bfloat16 if low else torch.float32)


def measure_matmul(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """FLOP/s of square matrix products: the best of the repetitions that fit into `seconds`."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    best, until = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        _ = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
        if time.perf_counter() > until:
            return best
