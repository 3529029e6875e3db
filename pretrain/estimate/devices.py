"""Devices: their peak rates, memory and links, for model FLOPs utilization and for estimates before a launch."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

_SIDE = 1024


@dataclass(frozen=True)
class Device:
    """One accelerator as its vendor's data sheet has it; rates without sparsity.

    Attributes:
        name: as people say it.
        bf16_flops, fp8_flops: dense tensor-core peaks, FLOP/s; None where there is no FP8.
        fp32_flops: peak of fp32 without tensor cores, which is what torch uses for fp32 unless told otherwise.
        memory: bytes (1 GB = 1e9 bytes, as data sheets count).
        bandwidth: of memory, bytes/s.
        link: to the other devices of its node, bytes/s in one direction.
        network: to other nodes, bytes/s in one direction, with as many ports as such nodes have for each device.
    """

    name: str
    bf16_flops: float
    fp8_flops: float | None
    fp32_flops: float
    memory: float
    bandwidth: float
    link: float
    network: float


# NVLink 3, 4 and 5: 600, 900 and 1800 GB/s in both directions together; PCIe 5 and 4 x16: 128 and 64 GB/s. Networks as
# in the vendors' own servers: one 400 Gb/s port for each device with Hopper and Blackwell, 200 Gb/s before.
DEVICES: dict[str, Device] = {
    "h100-sxm": Device("H100 SXM", 989e12, 1979e12, 67e12, 80e9, 3.35e12, 450e9, 50e9),
    "h100-pcie": Device("H100 PCIe", 756e12, 1513e12, 51e12, 80e9, 2.0e12, 64e9, 25e9),
    "h200": Device("H200 SXM", 989e12, 1979e12, 67e12, 141e9, 4.8e12, 450e9, 50e9),
    "gh200": Device("GH200", 989e12, 1979e12, 67e12, 96e9, 4.0e12, 450e9, 50e9),
    "b200": Device("B200", 2250e12, 4500e12, 75e12, 180e9, 8.0e12, 900e9, 50e9),
    "a100-80gb": Device("A100 SXM 80GB", 312e12, None, 19.5e12, 80e9, 2.039e12, 300e9, 25e9),
    "a100-40gb": Device("A100 SXM 40GB", 312e12, None, 19.5e12, 40e9, 1.555e12, 300e9, 25e9),
    "l40s": Device("L40S", 362e12, 733e12, 91.6e12, 48e9, 0.864e12, 32e9, 25e9),
}
# What torch calls them, most specific first.
_TORCH_NAMES = {
    "B200": "b200",
    "GH200": "gh200",
    "H200": "h200",
    "H100 PCIe": "h100-pcie",
    "H100": "h100-sxm",
    "A100": "a100-80gb",
    "L40S": "l40s",
}


def peak_flops(stated_tflops: float | None, precision: str) -> float:
    """Peak FLOP/s of one device: as stated, from the table, or (CPU, unknown GPU) of a measured matmul.

    Args:
        stated_tflops: ``log.peak_tflops``; wins when given.
        precision: type of the measured matmul.
    """
    import torch

    if stated_tflops is not None:
        return stated_tflops * 1e12
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        for part, key in _TORCH_NAMES.items():
            if part in name:
                return DEVICES[key].bf16_flops
    return measured_matmul_flops(torch.bfloat16 if precision == "bf16" and torch.cuda.is_available() else torch.float32)


def measured_matmul_flops(dtype=None, repeats: int = 5) -> float:
    """FLOP/s of the best of a few square matmuls with the threads this process has; fp32 unless ``dtype`` is given."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 8 * _SIDE if device == "cuda" else _SIDE
    a = torch.randn(side, side, dtype=dtype or torch.float32, device=device)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def this_cpu() -> Device:
    """The CPU that this runs on: matmul and copy rates measured in about a second, memory as the system reports it.

    Processes of one machine exchange data through its memory, so the copy rate stands for both links.
    """
    import torch

    flops = measured_matmul_flops()
    source = torch.ones(1 << 24)  # 64 MiB, larger than most caches
    target, best = torch.empty_like(source), float("inf")
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    copied = 2 * source.nbytes / best
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("CPU", flops, None, flops, memory, copied, copied / 2, copied / 2)
