"""Lengths of the clean stream and of tiles, from the configuration alone: importable without torch."""

from __future__ import annotations

import math

from bd3_megatron.attention.backends import candidates
from bd3_megatron.config import EngineConfig, KernelConfig, ParallelConfig

# Positions in a tile of the block-sparse kernels.
TILE = 128


def tile_size(length: int, block_size: int) -> int:
    """Positions per tile of the chunked backend, a multiple of the block.

    Smaller tiles waste less on pairs that the mask excludes, larger ones amortise a call better; these sizes were the
    fastest on one CPU core.
    """
    target = 64 if length <= 512 else 96 if length < 2048 else 128
    return block_size * max(1, target // block_size)


def clean_positions(length: int, block_size: int, skip_last_block: bool, multiple: int) -> int:
    """Positions of the clean stream that are computed: none where a row is one block, because nothing precedes it.

    Args:
        skip_last_block: end before the last block, which no query reads.
        multiple: the result stays a multiple of it, and at most ``length``.
    """
    if block_size == length:
        return 0
    return min(length, -(-(length - block_size) // multiple) * multiple) if skip_last_block else length


def skips_last_block(kernels: KernelConfig, parallel: ParallelConfig) -> bool:
    """True if the clean stream ends before its last block; context-parallel ranks need equal parts of all streams."""
    return kernels.skip_last_clean_block and parallel.context == 1


def clean_multiple(config: EngineConfig, cuda: bool) -> int:
    """Multiple that the clean stream's length must be: for sequence parallelism, FP8 and the attention backend.

    With ``kernels.attention=auto`` all backends count that may be taken on this type of device and whose multiple
    divides the row length.
    """
    multiple = config.token_multiple
    for backend in candidates(config.kernels.attention, "cuda" if cuda else "cpu"):
        if config.model.length % backend.multiple == 0:
            multiple = math.lcm(multiple, backend.multiple)
    return multiple
