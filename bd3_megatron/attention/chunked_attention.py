"""Two-stream attention by SDPA on any device: each tile of queries against the keys that it sees.

A tile of positions has the queries of every stream at these positions. They share the clean keys before the tile,
which are nearly all they see, so that one call of SDPA serves all of them. Nothing of size L x L is built: the largest
mask is one tile by the keys it sees, or one of these per row where rows are packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bd3_megatron.attention import inplace
from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.lengths import tile_size
from bd3_megatron.attention.mask import Streams, sees, within_documents

# Queries in one call where a block is too long for a mask over all of it.
_QUERIES = 128


@lru_cache(maxsize=512)
def _tile_mask(
    start: int, query_counts: tuple[int, ...], key_counts: tuple[int, ...], streams: Streams, device: torch.device
) -> Tensor:
    """Mask of a tile of all streams, ``[sum(query_counts), start + sum(key_counts)]``.

    Args:
        start: the tile's first position.
        query_counts: queries of each stream in the tile.
        key_counts: keys of each stream in the tile. The clean keys before it come first, if there is a clean stream.
    """

    def stream_and_block(counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        stream = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return stream, torch.cat([torch.arange(start, start + n) for n in counts]) // streams.block_size

    past = torch.arange(start if streams.clean else 0) // streams.block_size
    query_stream, query_block = stream_and_block(query_counts)
    key_stream, key_block = stream_and_block(key_counts)
    key_stream = torch.cat([torch.full_like(past, streams.clean_index), key_stream])
    key_block = torch.cat([past, key_block])
    mask = sees(query_stream[:, None], query_block[:, None], key_stream, key_block, streams.clean_index)
    return mask.to(device)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    streams: Streams,
    context: ContextShard,
    scale: float | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Attention of every stream; shapes as in ``AttentionBackend.attend``.

    Heads of one group lie along the query axis, so that grouped keys are never copied. Only the clean keys and values
    of other context-parallel ranks are gathered, or those of the block where a row has just one.
    """
    rows = _Rows(streams, context, scale, None if documents is None else Documents(documents))
    groups = key.shape[2]
    queries = streams.parts(query.unflatten(2, (groups, -1)), context.positions)  # S of [l, b, g, r, d]
    keys, values = (streams.parts(x, context.positions) for x in (key, value))
    if context.chunk % streams.block_size:
        return _only_block(queries, keys, values, rows).reshape(query.shape)
    size = min(tile_size(context.length, streams.block_size), context.chunk)
    size -= size % streams.block_size
    if _in_place(query, rows, size):
        return inplace.attend(query, key, value, streams, scale, size)
    # A tile of one block needs no mask but that of documents, a tile of several does.
    attend_tile = _tile_of_one_block if size == streams.block_size else _tile_of_blocks
    out: list[list[Tensor]] = [[] for _ in queries]
    for tile in _tiles_of_rows(queries, keys, values, rows, size):
        for stream, mixed in zip(out, attend_tile(tile, rows)):
            stream.append(mixed.permute(3, 0, 1, 2, 4))  # [b, g, r, C, d] -> [C, b, g, r, d]
    return torch.cat([tile for stream in out for tile in stream]).reshape(query.shape)


@dataclass(frozen=True)
class _Rows:
    """The setting of a call: streams, positions of this rank, factor on the logits, documents of packed rows."""

    streams: Streams
    context: ContextShard
    scale: float | None
    packed: Documents | None


# Keys and values, each a list of tiles ``[b, g, C, d]``.
Pair = list[list[Tensor]]


@dataclass(frozen=True)
class _Tile:
    """Queries of one tile of positions, and the keys and values that they may see.

    Attributes:
        queries: of each stream, S of ``[b, g, r, C, d]``.
        past: the clean tiles before it.
        own: its own tile of each stream.
        first, start: positions of the first key in ``past`` and of the tile.
    """

    queries: list[Tensor]
    past: Pair
    own: Pair
    first: int
    start: int

    def keys_and_values(self, stream: int | None = None) -> list[Tensor]:
        """Keys and values ``[b, g, K, d]``: those before the tile, then those of one or of all streams in it."""
        own = slice(None) if stream is None else slice(stream, stream + 1)
        return [torch.cat([*before, *here[own]], 2) for before, here in zip(self.past, self.own)]


def _in_place(query: Tensor, rows: _Rows, size: int) -> bool:
    """True for whole rows on CPU that are not packed: :mod:`.inplace` needs no copies of their keys."""
    joint = rows.streams.clean > 0 and size > rows.streams.block_size
    return joint and query.device.type == "cpu" and rows.context.size == 1 and rows.packed is None


def _tiles_of_rows(
    queries: list[Tensor], keys: list[Tensor], values: list[Tensor], rows: _Rows, size: int
) -> Iterator[_Tile]:
    """Tiles of ``size`` positions, in the order of this rank's positions."""
    streams, context, packed = rows.streams, rows.context, rows.packed
    own = [[_tiles(stream, context.chunk, size) for stream in x] for x in (keys, values)]
    clean = [x[-1] for x in own]  # all clean tiles, or this rank's alone, to which the others' are added
    if streams.clean and context.size > 1:
        clean = [_tiles(context.gather(x[-1]), context.chunk, size) for x in (keys, values)]
    per_chunk = -(-context.chunk // size)
    query_tiles = [_split(stream, context.chunk, size) for stream in queries]
    for i in range(len(query_tiles[0])):
        local_chunk, within = divmod(i, per_chunk)
        chunk = context.chunks[local_chunk]
        start, before = chunk * context.chunk + within * size, chunk * per_chunk + within
        skipped, first = 0, 0
        if not streams.clean:
            skipped, first = before, start
        elif packed is not None:
            # No query of any row sees a key before the earliest document at its position.
            other, inside = divmod(packed.first[start], context.chunk)
            skipped = other * per_chunk + inside // size
            first = other * context.chunk + inside // size * size
        yield _Tile(
            queries=[stream[i].permute(1, 2, 3, 0, 4) for stream in query_tiles if i < len(stream)],
            past=[x[skipped:before] for x in clean],
            own=[[stream[i] for stream in x if i < len(stream)] for x in own],  # the clean stream may be a tile short
            first=first,
            start=start,
        )


class Documents:
    """Documents of whole rows, and their extent around each position over all rows.

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


def _only_block(queries: list[Tensor], keys: list[Tensor], values: list[Tensor], rows: _Rows) -> Tensor:
    """Rows of one block spread over ranks: queries ``S of [l, b, g, r, d]`` see their stream's whole row."""
    context, packed, scale, out = rows.context, rows.packed, rows.scale, []
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


def _tile_of_blocks(tile: _Tile, rows: _Rows) -> list[Tensor]:
    """All streams of a tile of several blocks in one masked call; S of ``[b, g, r, C, d]``."""
    key, value = tile.keys_and_values()
    queries, packed, start = tile.queries, rows.packed, tile.start
    q = queries[0] if len(queries) == 1 else torch.cat(queries, 3)  # [b, g, r, T, d]
    repeats = q.shape[2]
    query_counts, key_counts = (tuple(x.shape[-2] for x in side) for side in (queries, tile.own[0]))
    mask = _tile_mask(start, query_counts, key_counts, rows.streams, q.device)
    if packed is not None:
        mask = mask[:, -key.shape[2] :]  # without the keys that were skipped; cached masks are those of all keys

        def numbers(counts: tuple[int, ...]) -> list[Tensor]:
            return [packed.numbers[:, start : start + n] for n in counts]

        key_document = torch.cat([packed.numbers[:, tile.first : start], *numbers(key_counts)], 1)
        query_document = torch.cat(numbers(query_counts), 1)
        mask = within_documents(mask, query_document[:, :, None], key_document[:, None])[:, None]
    if repeats > 1:
        mask = mask.repeat(*[1] * (mask.dim() - 2), repeats, 1)
    mixed = F.scaled_dot_product_attention(q.flatten(2, 3), key, value, attn_mask=mask, scale=rows.scale)
    return list(mixed.view(q.shape).split(query_counts, 3))


def _tile_of_one_block(tile: _Tile, rows: _Rows) -> list[Tensor]:
    """Each stream of a tile of one block sees all of its own block and all clean blocks before it."""
    out = []
    for stream, q in enumerate(tile.queries):  # [b, g, r, C, d]
        key, value = tile.keys_and_values(stream)
        if rows.packed is not None:
            out.append(_of_one_block(q, key, value, (tile.first, tile.start), rows.packed, rows.scale))
            continue
        out.append(F.scaled_dot_product_attention(q.flatten(2, 3), key, value, scale=rows.scale).view(q.shape))
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
        k, v = (x[:, :, low - first : high - first] for x in (key, value))
        mixed = F.scaled_dot_product_attention(part.flatten(2, 3), k, v, attn_mask=mask, scale=scale)
        out.append(mixed.view(part.shape))
        start = end
    return torch.cat(out, 3)
