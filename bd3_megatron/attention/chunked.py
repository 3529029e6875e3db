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
    tile = tile_size(length, streams.block_size)
    attend_tile = _tile_of_one_block if tile == streams.block_size else _tile_of_blocks

    queries = query.view(length, count, batch, groups, heads // groups, width).split(tile)
    tiles = [_key_tiles(x.view(length, count, batch, groups, width), tile, streams) for x in (key, value)]
    out = []
    for i, q in enumerate(queries):
        before = [clean[:i] for _, clean in tiles]
        here = [(noisy[i], clean[i] if clean else None) for noisy, clean in tiles]
        mixed = attend_tile(q.permute(2, 3, 1, 4, 0, 5), before, here, i * tile, streams, scale)
        out.append(mixed.permute(4, 2, 0, 1, 3, 5))  # [b, g, S, r, C, d] -> [C, S, b, g, r, d]
    return torch.cat(out).reshape(length, rows, heads, width)


def _key_tiles(x: Tensor, tile: int, streams: Streams) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Tiles ``[b, g, C, d]`` of keys or values ``[L, S, b, g, d]``: of every noisy draw, and of the clean stream.

    Splitting (not slicing) keeps the backward pass from filling a full-length gradient for every tile.
    """
    by_stream = [[t.permute(1, 2, 0, 3) for t in stream.split(tile)] for stream in x.unbind(1)]
    noisy, clean = by_stream[: streams.noisy], by_stream[streams.noisy :]
    return [list(draws) for draws in zip(*noisy)] or [[]] * len(by_stream[0]), clean[0] if clean else []


def _tile_of_blocks(q: Tensor, before: list, here: list, start: int, streams: Streams, scale: float | None) -> Tensor:
    """All streams of a tile of several blocks in one masked call; ``q`` and the result are [b, g, S, r, C, d]."""
    *_, size, width = q.shape
    key, value = (
        torch.cat([*past, *([] if clean is None else [clean]), *noisy], 2) for past, (noisy, clean) in zip(before, here)
    )
    mask = _tile_mask(start, start + size, streams, q.shape[3], q.device)
    out = F.scaled_dot_product_attention(q.reshape(*q.shape[:2], -1, width), key, value, attn_mask=mask, scale=scale)
    return out.view(q.shape)


def _tile_of_one_block(
    q: Tensor, before: list, here: list, start: int, streams: Streams, scale: float | None
) -> Tensor:
    """A tile that is one block: each stream sees all of its own block and all clean blocks before, so no mask."""
    own = [[*noisy, *([] if clean is None else [clean])] for noisy, clean in here]
    out = []
    for s in range(streams.count):
        key, value = (torch.cat([*past, streams_here[s]], 2) for past, streams_here in zip(before, own))
        one = q[:, :, s]
        flat = one.reshape(*one.shape[:2], -1, one.shape[-1])
        out.append(F.scaled_dot_product_attention(flat, key, value, scale=scale).view(one.shape))
    return torch.stack(out, 2)
