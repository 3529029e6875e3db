"""Two-stream attention on any device: each tile of queries against its live keys only.

A tile of positions holds the queries of every stream at these positions. They share the clean keys before the tile,
which is nearly all they see, so one call of torch's SDPA serves them together. Nothing of size L x L is built, let
alone (2L) x (2L): the largest mask is one tile by the keys it sees, for each row where rows hold documents.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.mask import Streams, sees, within_documents

# Queries in one call where a block is too long for a mask over all of it.
_QUERIES = 128


def tile_size(length: int, block_size: int) -> int:
    """Positions per tile, a multiple of the block: smaller wastes less on dead pairs, larger amortises a call
    better; these two won on one CPU core."""
    target = 64 if length <= 512 else 128
    return block_size * max(1, target // block_size)


@lru_cache(maxsize=512)
def _tile_mask(start: int, end: int, streams: Streams, repeats: int, device: torch.device) -> Tensor:
    """Mask of one joint tile, ``[S r C, start + S C]`` (``start`` keys only with a clean stream).

    Queries come as (stream, head of the group, position), keys as the clean positions before the tile followed by
    (stream, position of the tile).
    """
    inside = torch.arange(start, end, device=device) // streams.block_size
    past = torch.arange(start if streams.clean else 0, device=device) // streams.block_size
    stream = torch.arange(streams.count, device=device)
    query_block = inside.repeat(streams.count * repeats)
    query_stream = stream.repeat_interleave(repeats * (end - start))
    key_block = torch.cat([past, inside.repeat(streams.count)])
    key_stream = torch.cat([torch.full_like(past, streams.clean_index), stream.repeat_interleave(end - start)])
    return sees(query_stream[:, None], query_block[:, None], key_stream, key_block, streams.clean_index)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    streams: Streams,
    scale: float | None = None,
    context: ContextShard | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Attention of every stream; shapes as :func:`bd3_megatron.attention.reference.attend`.

    Heads of one group are laid along the query axis, so grouped keys are never copied. Of what other context-parallel
    ranks hold only the clean keys and values are needed, or those of the one block where a row has just one.
    """
    context = context or ContextShard(len(query))
    _, rows, heads, width = query.shape
    count, batch, groups = streams.count, rows // streams.count, key.shape[2]
    queries = query.view(-1, count, batch, groups, heads // groups, width)
    keys, values = (x.view(-1, count, batch, groups, width) for x in (key, value))
    packed = None if documents is None else Documents(documents)
    if context.chunk % streams.block_size:
        whole = context.gather(keys), context.gather(values)
        return _only_block(queries, *whole, scale, context, packed).reshape(query.shape)

    tile = min(tile_size(context.length, streams.block_size), context.chunk)
    tile -= tile % streams.block_size
    # A tile of one block needs no mask but that of documents, a tile of several does.
    attend_tile = _tile_of_one_block if tile == streams.block_size else _tile_of_blocks
    own = [[_tiles(stream, context.chunk, tile) for stream in x.unbind(1)] for x in (keys, values)]
    clean = own  # this rank's clean tiles are all of them, or are joined by those of the others
    if streams.clean and context.size > 1:
        clean = [[_tiles(context.gather(x[:, streams.clean_index]), context.chunk, tile)] for x in (keys, values)]
    per_chunk = -(-context.chunk // tile)
    out = []
    for i, q in enumerate(_split(queries, context.chunk, tile)):
        local_chunk, within = divmod(i, per_chunk)
        chunk = context.chunks[local_chunk]
        start = chunk * context.chunk + within * tile
        before = chunk * per_chunk + within
        skipped, first = 0, 0
        if not streams.clean:
            skipped, first = before, start
        elif packed is not None:
            # Tiles before the earliest document that a query of any row is in hold no key that is seen.
            other, inside = divmod(packed.first[start], context.chunk)
            skipped = other * per_chunk + inside // tile
            first = other * context.chunk + inside // tile * tile
        past = [x[-1][skipped:before] for x in clean]
        here = [[stream[i] for stream in x] for x in own]
        mixed = attend_tile(q.permute(2, 3, 1, 4, 0, 5), past, here, (first, start), streams, scale, packed)
        out.append(mixed.permute(4, 2, 0, 1, 3, 5))  # [b, g, S, r, C, d] -> [C, S, b, g, r, d]
    return torch.cat(out).reshape(query.shape)


class Documents:
    """Documents of whole rows, and which positions are of the same ones as some position in any row.

    Attributes:
        numbers: int ``[b, L]``, never falling along a row.
        first, last: for every position, the earliest start and the latest end over the rows of the document there;
            neither ever falls along the row.
    """

    def __init__(self, numbers: Tensor):
        self.numbers = numbers = numbers.contiguous()
        starts = torch.searchsorted(numbers, numbers).amin(0)
        ends = torch.searchsorted(numbers, numbers, right=True).amax(0)
        self.first, self.last = torch.stack([starts, ends]).tolist()  # one wait for the device, not one per tile


def _split(x: Tensor, chunk: int, tile: int) -> list[Tensor]:
    """Tiles of ``x`` along its first axis; no tile reaches over the end of a chunk.

    Splitting (not slicing) keeps the backward pass from filling a full-length gradient for every tile.
    """
    sizes = [min(tile, chunk - at) for at in range(0, chunk, tile)]
    return list(x.split(sizes * (len(x) // chunk)))


def _tiles(x: Tensor, chunk: int, tile: int) -> list[Tensor]:
    """Tiles ``[b, g, C, d]`` of one stream's keys or values ``[l, b, g, d]``."""
    return [t.permute(1, 2, 0, 3) for t in _split(x, chunk, tile)]


def _only_block(
    q: Tensor, key: Tensor, value: Tensor, scale: float | None, context: ContextShard, packed: Documents | None
) -> Tensor:
    """Rows of one block spread over ranks: every query ``[l, S, b, g, r, d]`` sees its stream's whole row."""
    length, count, batch, groups, repeats, width = q.shape
    if packed is not None:
        key, value = (x.permute(1, 2, 3, 0, 4) for x in (key, value))  # [S, b, g, L, d]
        out, parts = [], iter(q.permute(1, 2, 3, 4, 0, 5).split(context.chunk, 4))
        for chunk, part in zip(context.chunks, parts):
            start = chunk * context.chunk
            out.append([_of_one_block(one, key[s], value[s], (0, start), packed, scale) for s, one in enumerate(part)])
        return torch.cat([torch.stack(streams) for streams in out], 4).permute(4, 0, 1, 2, 3, 5)
    q = q.permute(1, 2, 3, 4, 0, 5).reshape(count * batch, groups, repeats * length, width)
    key, value = (x.permute(1, 2, 3, 0, 4).flatten(0, 1) for x in (key, value))
    out = F.scaled_dot_product_attention(q, key, value, scale=scale)
    return out.view(count, batch, groups, repeats, length, width).permute(4, 0, 1, 2, 3, 5)


# A tile's keys and values: ``past[0]`` and ``past[1]`` list the clean tiles before it, ``own`` its own tile per stream.
Pair = list[list[Tensor]]


def _tile_of_blocks(
    q: Tensor,
    past: Pair,
    own: Pair,
    bounds: tuple[int, int],
    streams: Streams,
    scale: float | None,
    packed: Documents | None,
) -> Tensor:
    """All streams of a tile of several blocks in one masked call; ``q`` and the result are [b, g, S, r, C, d].

    ``bounds``: the position of the first clean key given, and that of the tile.
    """
    key, value = (torch.cat([*before, *here], 2) for before, here in zip(past, own))
    (first, start), repeats = bounds, q.shape[3]
    end = start + q.shape[-2]
    mask = _tile_mask(start, end, streams, repeats, q.device)
    if packed is not None:
        mask = mask[:, -key.shape[2] :]  # without the keys that were skipped; cached masks are those of all keys
        inside = packed.numbers[:, start:end]
        key_document = torch.cat([packed.numbers[:, first:start], inside.repeat(1, streams.count)], 1)
        query_document = inside.repeat(1, streams.count * repeats)
        mask = within_documents(mask, query_document[:, :, None], key_document[:, None])[:, None]
    return F.scaled_dot_product_attention(q.flatten(2, 4), key, value, attn_mask=mask, scale=scale).view(q.shape)


def _tile_of_one_block(
    q: Tensor,
    past: Pair,
    own: Pair,
    bounds: tuple[int, int],
    streams: Streams,
    scale: float | None,
    packed: Documents | None,
) -> Tensor:
    """Each stream of a tile of one block sees all of its own block and all clean blocks before it."""
    out = []
    for s, one in enumerate(q.unbind(2)):  # [b, g, r, C, d]
        key, value = (torch.cat([*before, here[s]], 2) for before, here in zip(past, own))
        if packed is not None:
            out.append(_of_one_block(one, key, value, bounds, packed, scale))
            continue
        out.append(F.scaled_dot_product_attention(one.flatten(2, 3), key, value, scale=scale).view(one.shape))
    return torch.stack(out, 2)


def _of_one_block(
    q: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, int], packed: Documents, scale: float | None
) -> Tensor:
    """Queries ``[b, g, r, C, d]`` of one block that see all keys ``[b, g, K, d]`` of their own documents.

    Args:
        bounds: position of the first key and of the first query; keys and queries follow without a gap.

    Some queries at a time and the keys that these may see: the block may be as long as the row.
    """
    (first, start), repeats, out = bounds, q.shape[2], []
    for part in q.split(_QUERIES, 3):
        end = start + part.shape[3]
        low, high = packed.first[start], min(packed.last[end - 1], first + key.shape[2])
        low = max(low, first)
        query_document = packed.numbers[:, start:end].repeat(1, repeats)
        mask = within_documents(True, query_document[:, :, None], packed.numbers[:, None, low:high])[:, None]
        seen = (x[:, :, low - first : high - first] for x in (key, value))
        mixed = F.scaled_dot_product_attention(part.flatten(2, 3), *seen, attn_mask=mask, scale=scale)
        out.append(mixed.view(part.shape))
        start = end
    return torch.cat(out, 3)
