"""Two-stream attention on any device: each tile of queries against its live keys only.

A tile of positions holds the queries of every stream at these positions. They share the clean keys before the tile,
which is nearly all they see, so one call of torch's SDPA serves them together. Nothing of size L x L is built, let
alone (2L) x (2L): the largest mask is one tile by the keys it sees.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_megatron.attention.mask import Streams, sees


def tile_size(length: int, block_size: int) -> int:
    """Positions per tile, a multiple of the block: smaller wastes less on dead pairs, larger amortises a call
    better; these two won on one CPU core."""
    target = 64 if length <= 512 else 128
    return block_size * max(1, target // block_size)


@lru_cache(maxsize=512)
def _tile_mask(start: int, end: int, streams: Streams, repeats: int, device: torch.device) -> Tensor:
    """Mask of one joint tile, ``[S r C, end + K C]``.

    Queries come as (stream, head of the group, position), keys as the clean positions before ``end`` followed by
    (noisy draw, position of the tile).
    """
    inside = torch.arange(start, end, device=device) // streams.block_size
    before = torch.arange(end if streams.clean else 0, device=device) // streams.block_size
    stream = torch.arange(streams.count, device=device)
    query_block = inside.repeat(streams.count * repeats)
    query_stream = stream.repeat_interleave(repeats * (end - start))
    key_block = torch.cat([before, inside.repeat(streams.noisy)])
    key_stream = torch.cat(
        [torch.full_like(before, streams.clean_index), stream[: streams.noisy].repeat_interleave(end - start)]
    )
    return sees(query_stream[:, None], query_block[:, None], key_stream, key_block, streams.clean_index)


def attend(query: Tensor, key: Tensor, value: Tensor, streams: Streams, scale: float | None = None) -> Tensor:
    """Attention of every stream; shapes as :func:`bd3_megatron.attention.reference.attend`.

    Heads of one group are laid along the query axis, so grouped keys are never copied.
    """
    length, rows, heads, width = query.shape
    count, batch, groups = streams.count, rows // streams.count, key.shape[2]
    repeats = heads // groups
    tile = tile_size(length, streams.block_size)

    # Splitting (not slicing) keeps the backward pass from filling a full-length gradient for every tile.
    queries = query.view(length, count, batch, groups, repeats, width).split(tile)
    keys = key.view(length, count, batch, groups, width).split(tile)
    values = value.view(length, count, batch, groups, width).split(tile)
    one_block = tile == streams.block_size
    attend_tile = _tile_of_one_block if one_block else _tile_of_blocks

    clean_keys: list[Tensor] = []  # [b, g, C, d] of every tile so far
    clean_values: list[Tensor] = []
    out = []
    for q, k, v in zip(queries, keys, values):
        q = q.permute(2, 3, 1, 4, 0, 5)  # [b, g, S, r, C, d]
        k, v = (x.permute(2, 3, 1, 0, 4) for x in (k, v))  # [b, g, S, C, d]
        out.append(attend_tile(q, k, v, clean_keys, clean_values, streams, scale).permute(4, 2, 0, 1, 3, 5))
    return torch.cat(out).reshape(length, rows, heads, width)  # from tiles of [C, S, b, g, r, d]


def _tile_of_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clean_keys: list,
    clean_values: list,
    streams: Streams,
    scale: float | None,
) -> Tensor:
    """All streams of a tile of several blocks in one masked call."""
    *_, size, width = q.shape
    start = sum(x.shape[2] for x in clean_keys)
    if streams.clean:
        clean_keys.append(k[:, :, -1])
        clean_values.append(v[:, :, -1])
    mask = _tile_mask(start, start + size, streams, q.shape[3], q.device)
    out = F.scaled_dot_product_attention(
        q.reshape(*q.shape[:2], -1, width),
        torch.cat([*clean_keys, k[:, :, : streams.noisy].flatten(2, 3)], 2),
        torch.cat([*clean_values, v[:, :, : streams.noisy].flatten(2, 3)], 2),
        attn_mask=mask,
        scale=scale,
    )
    return out.view(q.shape)


def _tile_of_one_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clean_keys: list,
    clean_values: list,
    streams: Streams,
    scale: float | None,
) -> Tensor:
    """A tile that is one block: each stream sees all of its own block and all clean blocks before, so no mask."""
    width = q.shape[-1]
    out = [
        F.scaled_dot_product_attention(
            q[:, :, s].reshape(*q.shape[:2], -1, width),
            torch.cat([*clean_keys, k[:, :, s]], 2),
            torch.cat([*clean_values, v[:, :, s]], 2),
            scale=scale,
        ).view(q[:, :, s].shape)
        for s in range(streams.count)
    ]
    if streams.clean:
        clean_keys.append(k[:, :, -1])
        clean_values.append(v[:, :, -1])
    return torch.stack(out, 2)
