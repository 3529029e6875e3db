"""The chunked backend on CPU, for whole rows in tiles of several blocks: over keys that lie in place.

Built from differentiable pieces, each tile of queries needs a copy of all clean keys before it, which autograd keeps,
and computes pairs of its own positions that no stream sees. Here every query is attended in up to two parts: its own
noisy block, all blocks in one call, and the clean keys, one call for a tile of queries of all streams over a slice of
the clean keys. Softmaxes of parts are merged by their log-sum-exps (Dao et al., arXiv 2205.14135, section 3.1). With
the merged output and sum, the backward pass of each part gives its part of the gradients: no gradient passes through
a sum. Queries, keys, values, outputs and sums are all that is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bd3_megatron.attention.mask import Streams, sees

# What torch's scaled_dot_product_attention calls on CPU, with the log-sum-exps that its backward pass takes.
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Positions of noisy blocks that share a call's row: a mask tells them apart.
_OWN = 64


def attend(query: Tensor, key: Tensor, value: Tensor, streams: Streams, scale: float | None, tile: int) -> Tensor:
    """Attention of every stream of whole rows; shapes as :func:`bd3_megatron.attention.reference.attend`.

    Args:
        tile: positions per tile, a multiple of the block; rows hold a clean stream.
    """
    return _Attention.apply(query, key, value, streams, scale, tile)


@dataclass(frozen=True)
class _Tile:
    """Positions ``start .. start + size - 1`` of every stream.

    Attributes:
        skipped: first positions whose noisy queries see no clean key: those of block 0.
        clean: positions that the clean stream has of them.
        asking: clean queries, as many or none.
    """

    start: int
    size: int
    skipped: int
    clean: int
    asking: int

    def pieces(self, x: Tensor, streams: Streams) -> list[Tensor]:
        """The tile's part of every stream of queries ``[q, b, ...]``, views."""
        *noisy, last = streams.parts(x)
        if len(x) == streams.noisy * streams.length:
            noisy, last = [*noisy, last], x[:0]
        first, end = self.start + self.skipped, self.start + self.size
        return [*(part[first:end] for part in noisy), last[self.start : self.start + self.asking]]


def _tiles(streams: Streams, queries: int, tile: int) -> list[_Tile]:
    found, asks = [], queries == streams.tokens
    for start in range(0, streams.length, tile):
        size = min(tile, streams.length - start)
        clean = min(size, streams.clean - start)
        skipped = streams.block_size if start == 0 else 0
        found.append(_Tile(start, size, skipped, clean, clean if asks else 0))
    return found


@lru_cache(maxsize=64)
def _tile_mask(tile: _Tile, streams: Streams, dtype: torch.dtype) -> Tensor:
    """What is added to the logits of a tile's queries by the clean keys up to its own, ``[T, start + clean]``."""
    noisy, clean = torch.arange(tile.skipped, tile.size), torch.arange(tile.asking)
    query_block = torch.cat([noisy.repeat(streams.noisy), clean]) // streams.block_size
    counts = torch.tensor([len(noisy)] * streams.noisy + [len(clean)])
    query_stream = torch.arange(streams.noisy + 1).repeat_interleave(counts)
    key_block = torch.arange(tile.clean) // streams.block_size
    seen = sees(query_stream[:, None], query_block[:, None], streams.clean_index, key_block, streams.clean_index)
    mask = torch.zeros(len(seen), tile.start + tile.clean, dtype=dtype)
    mask[:, tile.start :].masked_fill_(~seen, -torch.inf)
    return mask


def _mask_of(tile: _Tile, tiles: list[_Tile], streams: Streams, repeats: int, dtype: torch.dtype) -> Tensor:
    """The mask of one tile: tiles of one kind share one, whose columns of zeros are those of the last of them."""

    def kind(t: _Tile) -> tuple[int, int, int]:
        return t.size, t.skipped, t.clean

    last = next(t for t in reversed(tiles) if kind(t) == kind(tile))
    return _tile_mask(last, streams, dtype)[:, last.start - tile.start :].repeat(repeats, 1)


class _Own:
    """Noisy blocks, several of which are one row of a call, ``[b K L / c, g, r c, d]``."""

    def __init__(self, streams: Streams):
        self.streams = streams
        blocks = streams.length // streams.block_size
        several = max(m for m in range(1, max(1, _OWN // streams.block_size) + 1) if blocks % m == 0)
        self.size = several * streams.block_size
        self.tokens = streams.noisy * streams.length

    def mask(self, repeats: int, dtype: torch.dtype) -> Tensor | None:
        if self.size == self.streams.block_size:
            return None
        block = torch.arange(self.size) // self.streams.block_size
        seen = block[:, None] == block
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf).repeat(repeats, 1)

    def gather(self, x: Tensor, groups: int) -> Tensor:
        """From ``[q, b, n, ...]``, heads of a group along the queries."""
        x = x[: self.tokens].unflatten(0, (-1, self.size)).unflatten(3, (groups, -1))  # [m, c, b, g, r, ...]
        order = (2, 0, 3, 4, 1, *range(5, x.dim()))
        return x.permute(order).flatten(3, 4).flatten(0, 1).contiguous()

    def spread(self, x: Tensor, batch: int, heads: int) -> Tensor:
        """Back to ``[K L, b, n, ...]``."""
        x = x.unflatten(0, (batch, -1)).unflatten(3, (-1, self.size))  # [b, m, g, r, c, ...]
        order = (1, 4, 0, 2, 3, *range(5, x.dim()))
        return x.permute(order).flatten(0, 1).flatten(2, 3)


def _gather(x: Tensor, tile: _Tile, streams: Streams, groups: int) -> Tensor:
    """Queries of a tile, or what goes with them, from ``[q, b, n, ...]``: ``[b, g, r T, ...]``."""
    pieces = [piece.unflatten(2, (groups, -1)) for piece in tile.pieces(x, streams)]  # [C, b, g, r, ...]
    order = (1, 2, 3, 0, *range(4, pieces[0].dim()))
    return torch.cat([piece.permute(order) for piece in pieces], 3).flatten(2, 3)


def _spread(x: Tensor, to: Tensor, tile: _Tile, streams: Streams, groups: int) -> None:
    """Write ``[b, g, r T, ...]`` to where :func:`_gather` takes it from."""
    pieces = tile.pieces(to, streams)
    x = x.unflatten(2, (to.shape[2] // groups, -1))  # [b, g, r, T, ...]
    order = (3, 0, 1, 2, *range(4, x.dim()))
    for piece, part in zip(pieces, x.split([len(piece) for piece in pieces], 3)):
        piece.unflatten(2, (groups, -1)).copy_(part.permute(order))


def _clean(x: Tensor, streams: Streams) -> Tensor:
    """Clean keys or values ``[b, g, L', d]`` in one piece."""
    return x[streams.noisy * streams.length :].permute(1, 2, 0, 3).contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, streams, scale, tile):
        groups, repeats = key.shape[2], query.shape[2] // key.shape[2]
        tiles, clean = _tiles(streams, len(query), tile), [_clean(x, streams) for x in (key, value)]
        # What block 0 of the noisy streams sees of the clean stream: nothing.
        out = torch.zeros_like(query)
        sums = torch.full(query.shape[:3], -torch.inf)
        for one in tiles:
            q, mask = _gather(query, one, streams, groups), _mask_of(one, tiles, streams, repeats, query.dtype)
            seen = (x[:, :, : one.start + one.clean] for x in clean)
            mixed, total = _FORWARD(q, *seen, 0.0, False, attn_mask=mask, scale=scale)
            _spread(mixed, out, one, streams, groups)
            _spread(total, sums, one, streams, groups)
        if streams.noisy:
            own = _Own(streams)
            parts = (own.gather(x, groups) for x in (query, key, value))
            mixed, total = _FORWARD(*parts, 0.0, False, attn_mask=own.mask(repeats, query.dtype), scale=scale)
            _merge(out[: own.tokens], sums[: own.tokens], *(own.spread(x, *query.shape[1:3]) for x in (mixed, total)))
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.streams, ctx.scale, ctx.tile = streams, scale, tile
        return out

    @staticmethod
    def backward(ctx, upstream):
        query, key, value, out, sums = ctx.saved_tensors
        streams, groups, repeats = ctx.streams, key.shape[2], query.shape[2] // key.shape[2]
        tiles, clean = _tiles(streams, len(query), ctx.tile), [_clean(x, streams) for x in (key, value)]
        by_query, by_key, by_value = torch.zeros_like(query), torch.empty_like(key), torch.empty_like(value)
        by_clean = [torch.zeros_like(x) for x in clean]
        rest = {"dropout_p": 0.0, "is_causal": False, "scale": ctx.scale}
        for one in tiles:
            q, g, o, total = (_gather(x, one, streams, groups) for x in (query, upstream, out, sums))
            mask, end = _mask_of(one, tiles, streams, repeats, query.dtype), one.start + one.clean
            found = _BACKWARD(g, q, *(x[:, :, :end] for x in clean), o, total, attn_mask=mask, **rest)
            _spread(found[0], by_query, one, streams, groups)
            for gradient, whole in zip(found[1:], by_clean):
                whole[:, :, :end] += gradient
        first = streams.noisy * streams.length
        for whole, by in zip(by_clean, (by_key, by_value)):
            by[first:] = whole.permute(2, 0, 1, 3)
        if streams.noisy:
            own = _Own(streams)
            q, g, o, total, k, v = (own.gather(x, groups) for x in (query, upstream, out, sums, key, value))
            found = _BACKWARD(g, q, k, v, o, total, attn_mask=own.mask(repeats, query.dtype), **rest)
            by_query[:first] += own.spread(found[0], *query.shape[1:3])
            for gradient, by in zip(found[1:], (by_key, by_value)):
                by[:first] = own.spread(gradient, *by.shape[1:3])
        return by_query, by_key, by_value, None, None, None


def _merge(out: Tensor, sums: Tensor, other: Tensor, other_sums: Tensor) -> None:
    """Merge another part's outputs and log-sum-exps into ``out`` and ``sums``."""
    total = torch.logaddexp(sums, other_sums)
    mine, others = (torch.exp(x - total)[..., None].to(out.dtype) for x in (sums, other_sums))
    out.mul_(mine).addcmul_(other, others)
    sums.copy_(total)
