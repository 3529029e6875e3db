"""What the attention backends cannot do, as far as a configuration says it: importable without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bd3_common.errors import ConfigError
from bd3_megatron.config import DiffusionConfig, Fp8Config, KernelConfig, ModelConfig, ParallelConfig
from bd3_megatron.layers.fp8 import token_multiple

# From the fastest to the plainest; ``auto`` never takes the last one, whose cost is quadratic in the streams.
NAMES = ("flash", "flex", "chunked", "reference")

# Positions in a tile of the block-sparse kernels, and the widths of a head that FlashAttention's were checked with.
TILE = 128
FLASH_WIDTHS = (64, 128)


def tile_size(length: int, block_size: int) -> int:
    """Positions per tile of the chunked backend, a multiple of the block: smaller wastes less on dead pairs, larger
    amortises a call better; these won on one CPU core."""
    target = 64 if length <= 512 else 96 if length < 2048 else 128
    return block_size * max(1, target // block_size)


def clean_positions(length: int, block_size: int, skip_last_block: bool, multiple: int) -> int:
    """Positions of the clean stream that are computed: none where a row is one block, because nothing precedes it.

    Args:
        skip_last_block: end before the last block, which none reads.
        multiple: of which they stay a multiple all the same.
    """
    if block_size == length:
        return 0
    return min(length, -(-(length - block_size) // multiple) * multiple) if skip_last_block else length


def skips_last_block(kernels: KernelConfig, parallel: ParallelConfig) -> bool:
    """Whether the clean stream ends before its last block: context-parallel ranks hold equal parts of every stream."""
    return kernels.skip_last_clean_block and parallel.context == 1


def clean_multiple(
    model: ModelConfig, kernels: KernelConfig, parallel: ParallelConfig, fp8: Fp8Config, cuda: bool
) -> int:
    """What the positions of the clean stream are a multiple of: sequence parallelism, FP8 and FlashAttention ask."""
    multiple = token_multiple(fp8, parallel)
    if cuda and kernels.attention in ("auto", "flash") and model.length % TILE == 0:
        multiple = math.lcm(multiple, TILE)
    return multiple


@dataclass(frozen=True)
class Demand:
    """What is asked of a backend.

    Attributes:
        precision: of queries, keys and values: fp32, bf16 or fp16.
        head_dim: width of a head.
        piece: neighbouring positions of a row that a rank holds: L, or a chunk of it with context parallelism.
        clean: positions of the clean stream.
    """

    precision: str
    head_dim: int
    piece: int
    clean: int = 0

    @classmethod
    def of(cls, model: ModelConfig, diffusion: DiffusionConfig, parallel: ParallelConfig, precision: str) -> Demand:
        """What a run asks for, before its model is built."""
        length = model.length
        piece = length if parallel.context == 1 else length // (2 * parallel.context)
        one_block = diffusion.objective == "diffusion" and diffusion.block_size == length
        return cls(precision, model.width_per_head, piece, 0 if one_block else length)


def refusal(name: str, demand: Demand) -> str | None:
    """Why the backend cannot do this on any device, or None."""
    if name == "flash":
        if demand.precision not in ("bf16", "fp16"):
            return f"takes bf16 and fp16, not {demand.precision}"
        if demand.head_dim not in FLASH_WIDTHS:
            return f"takes heads of {' or '.join(map(str, FLASH_WIDTHS))}, not {demand.head_dim}"
        for positions in (demand.piece, demand.clean):
            if positions % TILE:
                return f"takes pieces of a row in multiples of {TILE} positions, not {positions}"
    return None


def check_kernels(kernels: KernelConfig, demand: Demand) -> None:
    """Refuse a backend that the configuration already rules out, before anything starts.

    Raises:
        ConfigError: one line with the reason and what would do.
    """
    if kernels.attention != "auto" and (reason := refusal(kernels.attention, demand)):
        raise refused(kernels.attention, reason, [name for name in NAMES[:-1] if not refusal(name, demand)])


def refused(name: str, reason: str, others: list[str]) -> ConfigError:
    """The error for a backend that cannot do what is asked; ``others`` could."""
    names = ["auto", *(other for other in others if other != name)]
    return ConfigError(f"kernels.attention={name}: {reason}; use {', '.join(names[:-1])} or {names[-1]}")
