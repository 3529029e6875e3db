"""Two-stream attention by torch's FlexAttention: one Triton kernel that visits the listed tiles only.

On CUDA the kernel is compiled once for all layers. On CPU torch has no backward pass for it, so that the same lists and
predicate become a dense mask for SDPA, which costs (2L)^2 and is meant for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bd3_megatron.attention.mask import within_documents
from bd3_megatron.attention.tiles import TILE, Call, PerDocuments, Tiles, device_lists, document_lists

# Kernels in one process: training and evaluation, all queries and the noisy ones, last micro-batches of another size.
_KERNELS = 64

_per_documents = PerDocuments()


def attend(
    query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float, documents: Tensor | None, tile: int = TILE
) -> Tensor:
    """Attention of a call's queries ``[q, b, n, d]`` over its keys ``[k, b, g, d]``.

    Args:
        tile: queries and keys of a tile.
    """
    mask = block_mask(call, (tile, tile), query.device, documents)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, l, d]
    attention = compiled() if query.is_cuda else _written_out
    return attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=True).permute(2, 0, 1, 3)


def block_mask(call: Call, tile: tuple[int, int], device: torch.device, documents: Tensor | None = None) -> BlockMask:
    """The mask of a call, made once for all layers and steps, or once per micro-batch where rows are packed."""
    if documents is None:
        return _block_mask(call, tile, device)
    return _per_documents.get(documents, _document_mask, call, tile)


@lru_cache(maxsize=64)
def _block_mask(call: Call, tile: tuple[int, int], device: torch.device) -> BlockMask:
    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return call.sees(query, key, torch.where)

    return _of_lists(device_lists(call, tile, device), call, tile, seen)


def _document_mask(call: Call, tile: tuple[int, int], documents: Tensor) -> BlockMask:
    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        numbers = [documents[row, side.locate(at, torch.where)[1]] for side, at in zip(sides, (query, key))]
        return within_documents(call.sees(query, key, torch.where), *numbers)

    sides = call.queries, call.keys
    return _of_lists(document_lists(call, tile, documents), call, tile, seen)


def _of_lists(tiles: Tiles, call: Call, tile: tuple[int, int], seen: Callable[..., Tensor]) -> BlockMask:
    # torch derives the lists of the backward pass; a test holds them against ours.
    return BlockMask.from_kv_blocks(
        *tiles.forward, BLOCK_SIZE=tile, mask_mod=seen, seq_lengths=(call.queries.tokens, call.keys.tokens)
    )


@lru_cache(maxsize=1)
def compiled() -> Callable[..., Tensor]:
    """FlexAttention compiled for static shapes; ``fullgraph`` because eager mode would build every score."""
    limit = "recompile_limit"
    setattr(torch._dynamo.config, limit, max(_KERNELS, getattr(torch._dynamo.config, limit)))
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _written_out(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float | None, enable_gqa: bool
) -> Tensor:
    """SDPA with the dense mask of the lists and the predicate; ``[b, n, l, d]``."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=written_out_mask(block_mask, len(query)), scale=scale, enable_gqa=enable_gqa
    )


def written_out_mask(mask: BlockMask, rows: int) -> Tensor:
    """``[b or 1, 1, queries, keys]``: the predicate on partial tiles, true on full tiles, false elsewhere."""
    queries, keys = mask.seq_lengths
    device = mask.kv_indices.device

    def spread(count: Tensor, index: Tensor) -> Tensor:  # indices are a permutation of all tiles
        listed = torch.arange(index.shape[-1], device=device) < count[..., None]
        tiles = torch.zeros_like(listed).scatter(-1, index.long(), listed)
        for dim, size in zip((-2, -1), mask.BLOCK_SIZE):
            tiles = tiles.repeat_interleave(size, dim)
        return tiles[..., :queries, :keys]

    row = torch.arange(rows, device=device)[:, None, None, None]
    index = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    seen = mask.mask_mod(row, torch.zeros_like(row), *index)
    partial = spread(mask.kv_num_blocks, mask.kv_indices)
    return partial & seen | spread(mask.full_kv_num_blocks, mask.full_kv_indices)
