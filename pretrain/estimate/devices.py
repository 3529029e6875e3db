"""Devices: their peak rates, memory and links, for model FLOPs utilization and for estimates before a launch."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from bd3_common.machine import installed_memory

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
    "l40": Device("L40", 181e12, 362e12, 90.5e12, 48e9, 0.864e12, 32e9, 25e9),
    "gb200": Device("GB200", 2500e12, 5000e12, 80e12, 186e9, 8.0e12, 900e9, 50e9),
    "h800": Device("H800 SXM", 989e12, 1979e12, 67e12, 80e9, 3.35e12, 200e9, 50e9),
    "h20": Device("H20", 148e12, 296e12, 44e12, 96e9, 4.0e12, 450e9, 50e9),
    "a800": Device("A800 SXM 80GB", 312e12, None, 19.5e12, 80e9, 2.039e12, 200e9, 25e9),
    "a40": Device("A40", 149.7e12, None, 37.4e12, 48e9, 0.696e12, 32e9, 12.5e9),
    "a10": Device("A10", 125e12, None, 31.2e12, 24e9, 0.6e12, 32e9, 12.5e9),
    "l4": Device("L4", 121e12, 242e12, 30.3e12, 24e9, 0.3e12, 32e9, 12.5e9),
    "rtx-6000-ada": Device("RTX 6000 Ada", 364e12, 728e12, 91.1e12, 48e9, 0.96e12, 32e9, 12.5e9),
    "rtx-a6000": Device("RTX A6000", 154.8e12, None, 38.7e12, 48e9, 0.768e12, 32e9, 12.5e9),
    "rtx-5090": Device("RTX 5090", 209.5e12, 419e12, 104.8e12, 32e9, 1.792e12, 64e9, 12.5e9),
    "rtx-4090": Device("RTX 4090", 165.2e12, 330.3e12, 82.6e12, 24e9, 1.008e12, 32e9, 12.5e9),
    "rtx-3090": Device("RTX 3090", 71e12, None, 35.6e12, 24e9, 0.936e12, 32e9, 12.5e9),
}
# Everyday names, without hyphens, beside those of the table.
_ALSO = {
    "h100": "h100-sxm",
    "h100sxm5": "h100-sxm",
    "h10080gb": "h100-sxm",
    "h200sxm": "h200",
    "a100": "a100-80gb",
    "a100sxm": "a100-80gb",
    "a100sxm4": "a100-80gb",
    "a10080g": "a100-80gb",
    "a10040g": "a100-40gb",
    "a6000": "rtx-a6000",
    "6000ada": "rtx-6000-ada",
}
# What torch calls them, most specific first.
_TORCH_NAMES = {
    "GB200": "gb200",
    "B200": "b200",
    "GH200": "gh200",
    "H200": "h200",
    "H20": "h20",
    "H800": "h800",
    "H100 PCIe": "h100-pcie",
    "H100": "h100-sxm",
    "A100": "a100-80gb",
    "A800": "a800",
    "A6000": "rtx-a6000",
    "A40": "a40",
    "A10": "a10",
    "L40S": "l40s",
    "L40": "l40",
    "L4": "l4",
    "RTX 6000 Ada": "rtx-6000-ada",
    "RTX 5090": "rtx-5090",
    "RTX 4090": "rtx-4090",
    "RTX 3090": "rtx-3090",
}


def device_name(name: object) -> object:
    """The name in :data:`DEVICES` of an everyday one, whatever its case and hyphens: ``H100``, ``RTX 4090``, ``4090``.

    A name of no device is returned as it is.
    """
    if not isinstance(name, str):
        return name
    plain = re.sub(r"[\s_-]|nvidia|geforce|tesla", "", name.lower())
    known = {key.replace("-", ""): key for key in DEVICES}
    return (known | _ALSO).get(plain) or known.get(f"rtx{plain}") or (plain if plain == "cpu" else name)


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
    return Device("CPU", flops, None, flops, installed_memory(), copied, copied / 2, copied / 2)
