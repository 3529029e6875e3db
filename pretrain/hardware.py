"""Peak rates of devices, for model FLOPs utilization."""

from __future__ import annotations

import time

import torch

# Dense bf16 tensor-core peaks in TFLOP/s, from the vendor's data sheets.
_BF16_PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "GH200": 989,
    "A100": 312,
    "L40S": 362,
}
_SIDE = 1024


def peak_flops(stated_tflops: float | None, precision: str) -> float:
    """Peak FLOP/s of one device: as stated, from the table, or (CPU, unknown GPU) of a measured matmul.

    Args:
        stated_tflops: ``log.peak_tflops``; wins when given.
        precision: type of the measured matmul.
    """
    if stated_tflops is not None:
        return stated_tflops * 1e12
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for part, tflops in _BF16_PEAKS.items():
            if part in name:
                return tflops * 1e12
    return measured_matmul_flops(torch.bfloat16 if precision == "bf16" and torch.cuda.is_available() else torch.float32)


def measured_matmul_flops(dtype: torch.dtype = torch.float32, repeats: int = 5) -> float:
    """FLOP/s of the best of a few square matmuls with the threads this process has."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 8 * _SIDE if device == "cuda" else _SIDE
    a = torch.randn(side, side, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
