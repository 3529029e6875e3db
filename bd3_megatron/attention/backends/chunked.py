"""SDPA of each tile of queries against the keys it sees: any device, any shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from bd3_megatron.attention.backends import AttentionBackend, AttentionSizes
from bd3_megatron.attention.lengths import tile_size

if TYPE_CHECKING:
    from torch import Tensor

_FP32 = 4


class Chunked(AttentionBackend):
    """SDPA in tiles; the computation is in :mod:`bd3_megatron.attention.chunked_attention`."""

    name = "chunked"
    priority: ClassVar[Mapping[str, int]] = {"cuda": 10, "cpu": 10}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None) -> Tensor:
        from bd3_megatron.attention import chunked_attention

        return chunked_attention.attend(query, key, value, self.streams, self.context, scale, documents)

    @classmethod
    def activation_bytes(cls, sizes: AttentionSizes) -> float:
        """On CPU whole rows in tiles of several blocks are read in place; else every tile of queries keeps a copy of
        the clean keys and values before it."""
        chunk = sizes.length // (2 * sizes.context) if sizes.context > 1 else sizes.length
        block = sizes.block_size
        tile = min(tile_size(sizes.length, block), chunk)
        tile -= tile % block if tile > block else 0
        if sizes.context == 1 and sizes.clean and tile > block and not sizes.cuda and not sizes.packed:
            return sizes.inputs * sizes.element + sizes.queries * sizes.heads * _FP32
        return _bytes_of_tiles(sizes, chunk, tile)


def _bytes_of_tiles(sizes: AttentionSizes, chunk: int, tile: int) -> float:
    """Queries, keys, values, outputs, log-sum-exps and masks of all tiles of the first rank's chunks."""
    length, clean = sizes.length, sizes.clean
    query_lengths = [length] * sizes.noisy + ([clean] if clean and sizes.clean_queries else [])
    key_lengths = [length] * sizes.noisy + ([clean] if clean else [])
    repeats = sizes.heads / sizes.groups
    queries = keys = masks = 0.0
    for number in (0,) if sizes.context == 1 else (0, 2 * sizes.context - 1):
        for start in range(number * chunk, (number + 1) * chunk, tile):
            past = start if clean else 0
            end = min(start + tile, (number + 1) * chunk)
            here, there = (sum(max(0, min(end, n) - start) for n in side) for side in (query_lengths, key_lengths))
            queries += here
            if tile == sizes.block_size:  # each stream by itself, without a mask
                keys += here + past * sum(n > start for n in query_lengths)
            else:
                keys += past + there
                rows = sizes.micro_batch if sizes.packed else 1
                masks += here * repeats * (past + there) * sizes.element * rows
    outputs = 2 * queries * sizes.query_width * sizes.element + queries * sizes.heads * _FP32
    return sizes.micro_batch * (outputs + 2 * keys * sizes.key_width * sizes.element) + masks
