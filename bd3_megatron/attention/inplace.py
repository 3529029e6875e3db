"""In-place attention on CPU: the chunked backend for whole rows in tiles of several blocks, without copies of keys.

Built from differentiable operations, each tile of queries needs a copy of all clean keys before it, which autograd
keeps, and computes pairs that the mask excludes. Here every query is attended in up to two parts: its own noisy block
(all blocks in one call), and the clean keys (one call per tile of queries of all streams, over a slice of the clean
keys). Softmaxes of the parts are merged by their log-sum-exps (Dao et al., arXiv 2205.14135, section 3.1). Given the
merged output and sum, the backward pass of each part yields its share of the gradients, so that no gradient passes
through a sum. Only queries, keys, values, outputs and sums are kept.
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

# Positions of noisy blocks that are batched in one row of a call, separated by a mask.
_OWN = 64


def attend(query: Tensor, key: Tensor, value: Tensor, streams: Streams, scale: float | None, tile: int) -> Tensor:
    """Attention of every stream of whole rows; shapes as in ``AttentionBackend.attend``.

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
        clean_queries: queries of the clean stream: ``clean`` or none.
    """

    start: int
    size: int
    skipped: int
    clean: int
    clean_queries: int

    def parts(self, x: Tensor, streams: Streams) -> list[Tensor]:
        """The tile's part of every stream of queries ``[q, b, ...]``, views."""
        *noisy, last = streams.parts(x)
        if len(x) == streams.noisy * streams.length:
            noisy, last = [*noisy, last], x[:0]
        first, end = self.start + self.skipped, self.start + self.size
        return [*(part[first:end] for part in noisy), last[self.start : self.start + self.clean_queries]]


def _tiles(streams: Streams, queries: int, tile: int) -> list[_Tile]:
    found, all_streams = [], queries == streams.tokens
    for start in range(0, streams.length, tile):
        size = min(tile, streams.length - start)
        clean = min(size, streams.clean - start)
        skipped = streams.block_size if start == 0 else 0
        found.append(_Tile(start, size, skipped, clean, clean if all_streams else 0))
    return found


@lru_cache(maxsize=64)
def _tile_mask(tile: _Tile, streams: Streams, dtype: torch.dtype) -> Tensor:
    """Mask added to the logits of a tile's queries and the clean keys up to the tile's end, ``[T, start + clean]``."""
    noisy, clean = torch.arange(tile.skipped, tile.size), torch.arange(tile.clean_queries)
    query_block = torch.cat([noisy.repeat(streams.noisy), clean]) // streams.block_size
    counts = torch.tensor([len(noisy)] * streams.noisy + [len(clean)])
    query_stream = torch.arange(streams.noisy + 1).repeat_interleave(counts)
    key_block = torch.arange(tile.clean) // streams.block_size
    seen = sees(query_stream[:, None], query_block[:, None], streams.clean_index, key_block, streams.clean_index)
    mask = torch.zeros(len(seen), tile.start + tile.clean, dtype=dtype)
    mask[:, tile.start :].masked_fill_(~seen, -torch.inf)
    return mask


def _mask_of(tile: _Tile, tiles: list[_Tile], streams: Streams, repeats: int, dtype: torch.dtype) -> Tensor:
    """The mask of one tile, sliced from that of the last tile of the same kind, which has the most columns of zeros."""

    def kind(t: _Tile) -> tuple[int, int, int]:
        return t.size, t.skipped, t.clean

    last = next(t for t in reversed(tiles) if kind(t) == kind(tile))
    return _repeated(_tile_mask(last, streams, dtype)[:, last.start - tile.start :], repeats)


def _repeated(mask: Tensor, repeats: int) -> Tensor:
    """The mask for the heads of a group, which lie along the queries."""
    return mask if repeats == 1 else mask.repeat(repeats, 1)


class _Own:
    """Own-block attention of one row of the batch; c positions, whole blocks, make one row of a call:
    ``[K L / c, g, r c, d]``."""

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
        return _repeated(torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf), repeats)

    def take(self, x: Tensor, row: int, groups: int) -> Tensor:
        """From ``[q, b, n, ...]``, heads of a group along the queries; a view where each group has one."""
        x = x[: self.tokens, row].unflatten(0, (-1, self.size))  # [m, c, n, ...]
        if x.shape[2] == groups:
            return x.transpose(1, 2)
        x = x.unflatten(2, (groups, -1))
        return x.permute(0, 2, 3, 1, *range(4, x.dim())).flatten(2, 3)

    def back(self, x: Tensor, repeats: int) -> Tensor:
        """Inverse of :meth:`take` for one row: to ``[K L, n, ...]``."""
        x = x.unflatten(2, (repeats, self.size))  # [m, g, r, c, ...]
        return x.permute(0, 3, 1, 2, *range(4, x.dim())).flatten(0, 1).flatten(1, 2)


def _gather(x: Tensor, tile: _Tile, streams: Streams, groups: int) -> Tensor:
    """Queries of a tile, or what goes with them, from ``[q, b, n, ...]``: ``[b, g, r T, ...]``."""
    parts = [part.unflatten(2, (groups, -1)) for part in tile.parts(x, streams)]  # [C, b, g, r, ...]
    order = (1, 2, 3, 0, *range(4, parts[0].dim()))
    return torch.cat([part.permute(order) for part in parts], 3).flatten(2, 3)


def _spread(x: Tensor, to: Tensor, tile: _Tile, streams: Streams, groups: int) -> None:
    """Write ``[b, g, r T, ...]`` to where :func:`_gather` takes it from."""
    parts = tile.parts(to, streams)
    x = x.unflatten(2, (to.shape[2] // groups, -1))  # [b, g, r, T, ...]
    order = (3, 0, 1, 2, *range(4, x.dim()))
    for part, source in zip(parts, x.split([len(part) for part in parts], 3)):
        part.unflatten(2, (groups, -1)).copy_(source.permute(order))


def _clean(x: Tensor, streams: Streams) -> Tensor:
    """Clean keys or values ``[b, g, L', d]``, contiguous."""
    return x[streams.noisy * streams.length :].permute(1, 2, 0, 3).contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, streams, scale, tile):
        groups, repeats = key.shape[2], query.shape[2] // key.shape[2]
        tiles, clean = _tiles(streams, len(query), tile), [_clean(x, streams) for x in (key, value)]
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        _fill_first_block(out, 0.0, streams)
        _fill_first_block(sums, -torch.inf, streams)
        for one in tiles:
            q, mask = _gather(query, one, streams, groups), _mask_of(one, tiles, streams, repeats, query.dtype)
            seen = (x[:, :, : one.start + one.clean] for x in clean)
            mixed, total = _FORWARD(q, *seen, 0.0, False, attn_mask=mask, scale=scale)
            _spread(mixed, out, one, streams, groups)
            _spread(total, sums, one, streams, groups)
        own = _Own(streams)
        mask = own.mask(repeats, query.dtype)
        for row in range(query.shape[1] if streams.noisy else 0):
            parts = (own.take(x, row, groups) for x in (query, key, value))
            found = _FORWARD(*parts, 0.0, False, attn_mask=mask, scale=scale)
            _merge(*(x[: own.tokens, row] for x in (out, sums)), *(own.back(x, repeats) for x in found))
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.streams, ctx.scale, ctx.tile = streams, scale, tile
        return out

    @staticmethod
    def backward(ctx, upstream):
        query, key, value, out, sums = ctx.saved_tensors
        streams, groups, repeats = ctx.streams, key.shape[2], query.shape[2] // key.shape[2]
        tiles, clean = _tiles(streams, len(query), ctx.tile), [_clean(x, streams) for x in (key, value)]
        by_query, by_key, by_value = (torch.empty_like(x) for x in (query, key, value))
        _fill_first_block(by_query, 0.0, streams)
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
        own = _Own(streams)
        mask = own.mask(repeats, query.dtype)
        for row in range(query.shape[1] if streams.noisy else 0):
            g, q, k, v, o, total = (own.take(x, row, groups) for x in (upstream, query, key, value, out, sums))
            found = _BACKWARD(g, q, k, v, o, total.contiguous(), attn_mask=mask, **rest)
            by_query[:first, row] += own.back(found[0], repeats)
            by_key[:first, row], by_value[:first, row] = (own.back(x, 1) for x in found[1:])
        return by_query, by_key, by_value, None, None, None


def _fill_first_block(x: Tensor, by: float, streams: Streams) -> None:
    """Fill block 0 of the noisy streams, which sees no clean key and which no tile writes."""
    for noisy in streams.parts(x)[: streams.noisy]:
        noisy[: streams.block_size] = by


def _merge(out: Tensor, sums: Tensor, other: Tensor, other_sums: Tensor) -> None:
    """Merge another part's outputs and log-sum-exps into ``out`` and ``sums``."""
    total = torch.logaddexp(sums, other_sums)
    mine, others = (torch.exp(x - total)[..., None].to(out.dtype) for x in (sums, other_sums))
    out.mul_(mine).addcmul_(other, others)
    sums.copy_(total)
