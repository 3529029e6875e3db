"""Joint tiles of the chunked backend on CPU, over keys that lie in place.

A tile of queries sees the clean keys before it and the keys of its own positions. Built from differentiable pieces,
each tile needs a copy of all clean keys before it, which autograd keeps. Here the clean keys lie in one buffer, and the
own noisy keys of a tile are written behind its clean ones for the time of its call: they take the place of clean keys
that later tiles alone see, which is why tiles go from the last to the first. Queries, keys, values, outputs and
log-sum-exps are all that is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bd3_megatron.attention.mask import Streams, sees

# What torch's scaled_dot_product_attention calls on CPU, with the log-sum-exps that its backward pass takes.
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(query: Tensor, key: Tensor, value: Tensor, streams: Streams, scale: float | None, tile: int) -> Tensor:
    """Attention of every stream of whole rows; shapes as :func:`bd3_megatron.attention.reference.attend`.

    Args:
        tile: positions per tile, a multiple of the block; rows hold a clean stream.
    """
    return _Attention.apply(query, key, value, streams, scale, tile)


@dataclass(frozen=True)
class _Tile:
    """Positions ``start .. start + size - 1``; ``clean`` of them are keys of the clean stream, ``asking`` queries."""

    start: int
    size: int
    clean: int
    asking: int


def _tiles(streams: Streams, queries: int, tile: int) -> list[_Tile]:
    """From the last tile to the first."""
    asks = queries == streams.tokens
    found = []
    for start in range(0, streams.length, tile):
        size = min(tile, streams.length - start)
        clean = min(size, streams.clean - start)
        found.append(_Tile(start, size, clean, clean if asks else 0))
    return found[::-1]


@lru_cache(maxsize=64)
def _mask(tile: _Tile, streams: Streams, dtype: torch.dtype) -> Tensor:
    """What is added to the logits of the tile's queries (noisy streams, then clean) by its keys ``[T, past + own]``
    (the clean ones before it, its own clean ones, then the noisy ones). ``tile.start`` is that of the last such tile:
    earlier ones have fewer columns of zeros on the left."""

    def tokens(clean_first: bool, clean: int) -> tuple[Tensor, Tensor]:
        noisy = [(stream, tile.size) for stream in range(streams.noisy)]
        order = [(streams.noisy, clean), *noisy] if clean_first else [*noisy, (streams.noisy, clean)]
        stream, count = torch.tensor(order).T
        return stream.repeat_interleave(count), torch.cat([torch.arange(n) for _, n in order]) // streams.block_size

    query_stream, query_block = tokens(False, tile.asking)
    key_stream, key_block = tokens(True, tile.clean)
    own = sees(query_stream[:, None], query_block[:, None], key_stream, key_block, streams.clean_index)
    mask = torch.zeros(len(own), tile.start + own.shape[1], dtype=dtype)
    mask[:, tile.start :].masked_fill_(~own, -torch.inf)
    return mask


class _Buffers:
    """Keys and values ``[b, g, ., d]``: the clean ones in place, room behind them for a tile's noisy ones."""

    def __init__(self, key: Tensor, value: Tensor, streams: Streams, tile: int):
        self.streams, self.parts = streams, [streams.parts(x) for x in (key, value)]
        batch, groups, width = key.shape[1:]
        room = streams.clean + streams.noisy * tile
        self.held = [key.new_empty(batch, groups, room, width) for _ in self.parts]
        for held, parts in zip(self.held, self.parts):
            held[:, :, : streams.clean] = _heads_first(parts[-1])

    def of(self, tile: _Tile) -> list[Tensor]:
        """Keys and values that the tile sees, ``[b, g, past + own, d]``; later tiles have to have come before."""
        at = tile.start + tile.clean
        for held, parts in zip(self.held, self.parts):
            for number, noisy in enumerate(parts[: self.streams.noisy]):
                begin = at + number * tile.size
                held[:, :, begin : begin + tile.size] = _heads_first(noisy[tile.start : tile.start + tile.size])
        return [held[:, :, : at + self.streams.noisy * tile.size] for held in self.held]


def _heads_first(x: Tensor) -> Tensor:  # [l, b, g, d] -> [b, g, l, d]
    return x.permute(1, 2, 0, 3)


def _pieces(x: Tensor, tile: _Tile, streams: Streams) -> Iterator[Tensor]:
    """The tile's part of every stream of queries ``[q, b, ...]``, views."""
    for number, part in enumerate(streams.parts(x)):
        size = tile.size if number < streams.noisy else tile.asking
        yield part[tile.start : tile.start + size]


def _gathered(x: Tensor, tile: _Tile, streams: Streams, groups: int) -> Tensor:
    """Queries (or what is shaped like them) of a tile, heads of a group along the queries: ``[b, g, r T, d]``."""
    pieces = [piece.unflatten(2, (groups, -1)).permute(1, 2, 3, 0, 4) for piece in _pieces(x, tile, streams)]
    return torch.cat(pieces, 3).flatten(2, 3)


def _scatter(x: Tensor, to: Tensor, tile: _Tile, streams: Streams, groups: int) -> None:
    """Write ``[b, g, r T, d]`` to where :func:`_gathered` takes it from."""
    pieces = list(_pieces(to, tile, streams))
    by_head = x.unflatten(2, (to.shape[2] // groups, -1))  # [b, g, r, T, d]
    for piece, part in zip(pieces, by_head.split([len(piece) for piece in pieces], 3)):
        piece.unflatten(2, (groups, -1)).copy_(part.permute(3, 0, 1, 2, 4))


def _mask_of(tile: _Tile, tiles: list[_Tile], streams: Streams, heads_per_group: int, dtype: torch.dtype) -> Tensor:
    """The mask of one tile, a view of that of the last tile of its kind."""
    kind = next(t for t in tiles if (t.size, t.clean) == (tile.size, tile.clean))
    mask = _mask(kind, streams, dtype)[:, kind.start - tile.start :]
    return mask if heads_per_group == 1 else mask.repeat(heads_per_group, 1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, streams, scale, tile):
        groups, repeats = key.shape[2], query.shape[2] // key.shape[2]
        tiles, buffers = _tiles(streams, len(query), tile), _Buffers(key, value, streams, tile)
        out, sums = torch.empty_like(query), []
        for one in tiles:
            q, mask = _gathered(query, one, streams, groups), _mask_of(one, tiles, streams, repeats, query.dtype)
            mixed, total = _FORWARD(q, *buffers.of(one), 0.0, False, attn_mask=mask, scale=scale)
            _scatter(mixed, out, one, streams, groups)
            sums.append(total)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.streams, ctx.scale, ctx.tile = streams, scale, tile
        return out

    @staticmethod
    def backward(ctx, upstream):
        query, key, value, out, *sums = ctx.saved_tensors
        streams, groups, repeats = ctx.streams, key.shape[2], query.shape[2] // key.shape[2]
        tiles, buffers = _tiles(streams, len(query), ctx.tile), _Buffers(key, value, streams, ctx.tile)
        by_query, by_key, by_value = (torch.empty_like(x) for x in (query, key, value))
        clean = [torch.zeros_like(held[:, :, : streams.clean]) for held in buffers.held]
        for one, total in zip(tiles, sums):
            q, g, o = (_gathered(x, one, streams, groups) for x in (query, upstream, out))
            mask = _mask_of(one, tiles, streams, repeats, query.dtype)
            found = _BACKWARD(g, q, *buffers.of(one), o, total, 0.0, False, attn_mask=mask, scale=ctx.scale)
            _scatter(found[0], by_query, one, streams, groups)
            at = one.start + one.clean
            for gradient, by_clean, by in zip(found[1:], clean, (by_key, by_value)):
                by_clean[:, :, :at] += gradient[:, :, :at]
                for number, part in enumerate(streams.parts(by)[: streams.noisy]):
                    own = gradient[:, :, at + number * one.size : at + (number + 1) * one.size]
                    part[one.start : one.start + one.size] = own.permute(2, 0, 1, 3)
        for by_clean, by in zip(clean, (by_key, by_value)):
            streams.parts(by)[-1].copy_(by_clean.permute(2, 0, 1, 3))
        return by_query, by_key, by_value, None, None, None
