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

from bd3_megatron.attention import inplace
from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.limits import tile_size
from bd3_megatron.attention.mask import Streams, sees, within_documents

# Queries in one call where a block is too long for a mask over all of it.
_QUERIES = 128


@lru_cache(maxsize=512)
def _tile_mask(
    start: int, asking: tuple[int, ...], asked: tuple[int, ...], streams: Streams, device: torch.device
) -> Tensor:
    """Mask of one joint tile that begins at position ``start``, ``[sum(asking), start + sum(asked)]``.

    Args:
        asking: queries of each stream in the tile.
        asked: keys of each stream in the tile. The clean keys before it come first, if there is a clean stream.
    """

    def stream_and_block(counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        stream = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return stream, torch.cat([torch.arange(start, start + n) for n in counts]) // streams.block_size

    past = torch.arange(start if streams.clean else 0) // streams.block_size
    query_stream, query_block = stream_and_block(asking)
    key_stream, key_block = stream_and_block(asked)
    key_stream = torch.cat([torch.full_like(past, streams.clean_index), key_stream])
    key_block = torch.cat([past, key_block])
    mask = sees(query_stream[:, None], query_block[:, None], key_stream, key_block, streams.clean_index)
    return mask.to(device)


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
    context = context or ContextShard(streams.length)
    groups = key.shape[2]
    queries = streams.parts(query.unflatten(2, (groups, -1)), context.held)  # S of [l, b, g, r, d]
    keys, values = (streams.parts(x, context.held) for x in (key, value))
    packed = None if documents is None else Documents(documents)
    if context.chunk % streams.block_size:
        return _only_block(queries, keys, values, scale, context, packed).reshape(query.shape)

    tile = min(tile_size(context.length, streams.block_size), context.chunk)
    tile -= tile % streams.block_size
    if _in_place(query, streams, context, packed, tile):
        return inplace.attend(query, key, value, streams, scale, tile)
    # A tile of one block needs no mask but that of documents, a tile of several does.
    attend_tile = _tile_of_one_block if tile == streams.block_size else _tile_of_blocks
    own = [[_tiles(stream, context.chunk, tile) for stream in x] for x in (keys, values)]
    clean = [x[-1] for x in own]  # this rank's clean tiles are all of them, or are joined by those of the others
    if streams.clean and context.size > 1:
        clean = [_tiles(context.gather(x[-1]), context.chunk, tile) for x in (keys, values)]
    per_chunk = -(-context.chunk // tile)
    asking = [_split(stream, context.chunk, tile) for stream in queries]
    out: list[list[Tensor]] = [[] for _ in asking]
    for i in range(len(asking[0])):
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
        # The clean stream may be a tile short.
        here = [[stream[i] for stream in x if i < len(stream)] for x in own]
        past = [x[skipped:before] for x in clean]
        q = [stream[i].permute(1, 2, 3, 0, 4) for stream in asking if i < len(stream)]
        for stream, mixed in zip(out, attend_tile(q, past, here, (first, start), streams, scale, packed)):
            stream.append(mixed.permute(3, 0, 1, 2, 4))  # [b, g, r, C, d] -> [C, b, g, r, d]
    return torch.cat([tile for stream in out for tile in stream]).reshape(query.shape)


def _in_place(query: Tensor, streams: Streams, context: ContextShard, packed: Documents | None, tile: int) -> bool:
    """Whether the rows are of the usual kind, for which a CPU has a way without copies of keys."""
    joint = streams.clean > 0 and tile > streams.block_size
    return joint and query.device.type == "cpu" and context.size == 1 and packed is None


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
    """Tiles of ``x`` along its first axis; no tile reaches over the end of a chunk, the last one may be short.

    Splitting (not slicing) keeps the backward pass from filling a full-length gradient for every tile.
    """
    sizes = [min(tile, chunk - at) for at in range(0, chunk, tile)] * -(-len(x) // chunk)
    kept, left = [], len(x)
    for size in sizes:
        kept.append(min(size, left))
        left -= kept[-1]
    return list(x.split([size for size in kept if size]))


def _tiles(x: Tensor, chunk: int, tile: int) -> list[Tensor]:
    """Tiles ``[b, g, C, d]`` of one stream's keys or values ``[l, b, g, d]``."""
    return [t.permute(1, 2, 0, 3) for t in _split(x, chunk, tile)]


def _only_block(
    queries: list[Tensor],
    keys: list[Tensor],
    values: list[Tensor],
    scale: float | None,
    context: ContextShard,
    packed: Documents | None,
) -> Tensor:
    """Rows of one block spread over ranks: queries ``S of [l, b, g, r, d]`` see their stream's whole row."""
    out = []
    for q, *own in zip(queries, keys, values):
        key, value = (context.gather(x).permute(1, 2, 0, 3) for x in own)  # [b, g, L, d]
        q = q.permute(1, 2, 3, 0, 4)  # [b, g, r, l, d]
        if packed is None:
            mixed = F.scaled_dot_product_attention(q.flatten(2, 3), key, value, scale=scale).view(q.shape)
        else:
            starts = [chunk * context.chunk for chunk in context.chunks]
            parts = zip(q.split(context.chunk, 3), starts)
            mixed = torch.cat([_of_one_block(part, key, value, (0, at), packed, scale) for part, at in parts], 3)
        out.append(mixed.permute(3, 0, 1, 2, 4))
    return torch.cat(out)


# A tile's keys and values: ``past[0]`` and ``past[1]`` list the clean tiles before it, ``own`` its own tile per stream.
Pair = list[list[Tensor]]


def _tile_of_blocks(
    queries: list[Tensor],
    past: Pair,
    own: Pair,
    bounds: tuple[int, int],
    streams: Streams,
    scale: float | None,
    packed: Documents | None,
) -> list[Tensor]:
    """All streams of a tile of several blocks in one masked call; queries and the result are S of [b, g, r, C, d].

    ``bounds``: the position of the first clean key given, and that of the tile.
    """
    key, value = (torch.cat([*before, *here], 2) for before, here in zip(past, own))
    q = queries[0] if len(queries) == 1 else torch.cat(queries, 3)  # [b, g, r, T, d]
    (first, start), repeats = bounds, q.shape[2]
    asking, asked = (tuple(x.shape[-2] for x in side) for side in (queries, own[0]))
    mask = _tile_mask(start, asking, asked, streams, q.device)
    if packed is not None:
        mask = mask[:, -key.shape[2] :]  # without the keys that were skipped; cached masks are those of all keys

        def numbers(counts: tuple[int, ...]) -> list[Tensor]:
            return [packed.numbers[:, start : start + n] for n in counts]

        key_document = torch.cat([packed.numbers[:, first:start], *numbers(asked)], 1)
        query_document = torch.cat(numbers(asking), 1)
        mask = within_documents(mask, query_document[:, :, None], key_document[:, None])[:, None]
    if repeats > 1:
        mask = mask.repeat(*[1] * (mask.dim() - 2), repeats, 1)
    mixed = F.scaled_dot_product_attention(q.flatten(2, 3), key, value, attn_mask=mask, scale=scale)
    return list(mixed.view(q.shape).split(asking, 3))


def _tile_of_one_block(
    queries: list[Tensor],
    past: Pair,
    own: Pair,
    bounds: tuple[int, int],
    streams: Streams,
    scale: float | None,
    packed: Documents | None,
) -> list[Tensor]:
    """Each stream of a tile of one block sees all of its own block and all clean blocks before it."""
    out = []
    for s, q in enumerate(queries):  # [b, g, r, C, d]
        key, value = (torch.cat([*before, here[s]], 2) for before, here in zip(past, own))
        if packed is not None:
            out.append(_of_one_block(q, key, value, bounds, packed, scale))
            continue
        out.append(F.scaled_dot_product_attention(q.flatten(2, 3), key, value, scale=scale).view(q.shape))
    return out


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
