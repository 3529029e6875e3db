"""Tiles of the attention matrix that a block-sparse kernel visits, by arithmetic on block numbers.

A kernel walks the matrix in tiles of queries by keys. A tile is full when the mask admits every pair of it, partial
when it admits some, and is left out when it admits none. Block-sparse kernels take four lists: for every tile of
queries the full and the partial tiles of keys (forward pass), and for every tile of keys those of queries (backward
pass). They follow from the first and last block of each tile; no mask of tokens is ever built.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.lengths import TILE
from bd3_megatron.attention.mask import Streams, sees


class Run(NamedTuple):
    """Neighbouring tokens of one stream: positions ``start .. start + length - 1``."""

    stream: int
    start: int
    length: int


@dataclass(frozen=True)
class Side:
    """The queries or the keys of a call, in order: the noisy streams, then the clean one.

    Attributes:
        noisy: noisy streams.
        chunk: positions of a chunk of neighbouring positions; L for whole rows.
        starts: first position of each chunk of a noisy stream, in order.
        clean: tokens of the clean stream; 0 without one.
        whole: True if the clean stream has positions ``0 .. clean - 1``, False if it has the noisy streams' chunks.
    """

    noisy: int
    chunk: int
    starts: tuple[int, ...] = (0,)
    clean: int = 0
    whole: bool = True

    @property
    def per_stream(self) -> int:
        """Positions of each noisy stream."""
        return self.chunk * len(self.starts)

    @property
    def tokens(self) -> int:
        return self.noisy * self.per_stream + self.clean

    def runs(self) -> list[Run]:
        """The tokens as runs, in order."""
        runs = [Run(stream, start, self.chunk) for stream in range(self.noisy) for start in self.starts]
        if self.clean and self.whole:
            return [*runs, Run(self.noisy, 0, self.clean)]
        return runs + [Run(self.noisy, start, self.chunk) for start in self.starts if self.clean]

    def positions(self) -> np.ndarray:
        """Position in the row of every token, int64 ``[tokens]``."""
        return np.concatenate([np.arange(run.start, run.start + run.length) for run in self.runs()])

    def locate(self, index: Any, where: Callable[[Any, Any, Any], Any]) -> tuple[Any, Any]:
        """Stream and position of the token ``index``, by arithmetic that kernels compile.

        Args:
            index: integers of any library.
            where: that library's ``where(condition, then, otherwise)``.
        """
        if self.starts == (0,):
            # The clean stream is not longer than a noisy one, and comes last.
            if not self.noisy:
                return 0, index
            return index // self.chunk, index % self.chunk
        stream, within = index // self.per_stream, index % self.per_stream
        first, second = self.starts
        position = within + first + within // self.chunk * (second - first - self.chunk)
        if not (self.clean and self.whole):
            return stream, position
        end = self.noisy * self.per_stream
        return where(index < end, stream, self.noisy), where(index < end, position, index - end)


@dataclass(frozen=True)
class Call:
    """Queries and keys of one call of a kernel, and the parameters of their mask.

    Attributes:
        block_size: tokens per block, B'.
        clean: index of the clean stream, or -1.
        queries, keys: the tokens on either side.
    """

    block_size: int
    clean: int
    queries: Side
    keys: Side

    @classmethod
    def of(cls, streams: Streams, queries: int, context: ContextShard | None = None) -> Call:
        """The call for ``queries`` tokens: those of all streams, or those of the noisy ones.

        With context parallelism queries are this rank's. Keys are its own noisy ones and the whole clean stream, or
        all streams whole where a chunk is part of a block (see :func:`gathers_all`).
        """
        noisy, clean = streams.noisy, streams.clean
        whole = Side(noisy, streams.length, clean=clean)
        if context is None or context.size == 1:
            own = keys = whole
        else:
            starts = tuple(chunk * context.chunk for chunk in context.chunks)
            own = Side(noisy, context.chunk, starts, context.positions if clean else 0, whole=False)
            keys = whole if gathers_all(streams, context) else Side(noisy, context.chunk, starts, clean)
        if queries != own.tokens:
            own = Side(own.noisy, own.chunk, own.starts)
        if queries != own.tokens:
            raise ValueError(f"{queries} queries are neither those of all streams nor the noisy ones of {streams}")
        return cls(streams.block_size, streams.clean_index, own, keys)

    def sees(self, query: Any, key: Any, where: Callable[[Any, Any, Any], Any]) -> Any:
        """True where the query of index ``query`` sees the key of index ``key`` (integers of any library)."""
        query_stream, query_position = self.queries.locate(query, where)
        key_stream, key_position = self.keys.locate(key, where)
        size = self.block_size
        return sees(query_stream, query_position // size, key_stream, key_position // size, self.clean)


def gathers_all(streams: Streams, context: ContextShard) -> bool:
    """True if a block lies on several ranks, so that noisy keys have to be gathered too."""
    return context.chunk % streams.block_size > 0


def prepare(
    query: Tensor, key: Tensor, value: Tensor, streams: Streams, context: ContextShard
) -> tuple[Call, Tensor, Tensor]:
    """The call for a rank's queries, and its keys and values ``[keys, b, g, d]``, gathered where it needs others'."""
    key, value = (_keys_of_call(x, streams, context) for x in (key, value))
    return Call.of(streams, len(query), context), key, value


def _keys_of_call(x: Tensor, streams: Streams, context: ContextShard) -> Tensor:
    """Keys or values as :meth:`Call.of` lists them, from this rank's ``[k, b, g, d]`` of every stream."""
    if context.size == 1:
        return x
    if gathers_all(streams, context):
        return context.gather_streams(x)
    own = streams.noisy * context.positions
    if not streams.clean:
        return x
    return torch.cat([x[:own], context.gather(x[own:])])


class Lists(NamedTuple):
    """Tiles that each tile of one side has to visit on the other side.

    Attributes:
        partial_count, full_count: int32 ``[..., n]``.
        partial, full: int32 ``[..., n, m]``, indices of tiles, ascending up to the count; what follows is undefined.
    """

    partial_count: Any
    partial: Any
    full_count: Any
    full: Any


class Tiles(NamedTuple):
    """Tiles of a call: for every tile of queries those of keys, and the transpose."""

    forward: Lists
    backward: Lists


def live_and_full(call: Call, tile: tuple[int, int] = (TILE, TILE)) -> tuple[np.ndarray, np.ndarray]:
    """Tiles with any admitted pair, and tiles with nothing else: bool ``[queries / tile, keys / tile]`` each.

    A last tile that is not whole counts as partial, because a kernel has to keep to its edge. Tiles may lie across
    the border of two streams.

    Args:
        tile: queries and keys of a tile.
    """
    query, key = (_spans(side, call.block_size, size) for side, size in zip((call.queries, call.keys), tile))
    same = query.stream[:, None] == key.stream
    clean = key.stream == call.clean
    # Own block, and blocks of the clean stream before it: for spans from a first to a last block each.
    own_any = same & (query.first[:, None] <= key.last) & (key.first <= query.last[:, None])
    own_all = (
        same & (query.first == query.last)[:, None] & (key.first == key.last) & (query.first[:, None] == key.first)
    )
    earlier_any = clean & (key.first < query.last[:, None])
    earlier_all = clean & (key.last < query.first[:, None])
    # Of its own stream a clean query sees both kinds.
    earlier_all |= clean & same & (key.last <= query.first[:, None])
    live, full = own_any | earlier_any, own_all | earlier_all
    starts = query.begins, key.begins
    live = np.logical_or.reduceat(np.logical_or.reduceat(live, starts[0], 0), starts[1], 1)
    full = np.logical_and.reduceat(np.logical_and.reduceat(full, starts[0], 0), starts[1], 1)
    full[-1] &= call.queries.tokens % tile[0] == 0
    full[:, -1] &= call.keys.tokens % tile[1] == 0
    return live, full


class _Spans(NamedTuple):
    """Parts of tiles that lie in one run each: stream, first and last block, and the first span of every tile."""

    stream: np.ndarray
    first: np.ndarray
    last: np.ndarray
    begins: np.ndarray


def _spans(side: Side, block_size: int, tile: int) -> _Spans:
    runs = np.array(side.runs())
    stream, start, count = runs.T
    offset = np.cumsum(count) - count
    tiles = np.arange(0, side.tokens, tile)
    begin = np.union1d(offset, tiles)  # of each span, along the side
    end = np.append(begin[1:], side.tokens)
    run = np.searchsorted(offset, begin, "right") - 1
    position = begin - offset[run] + start[run]
    last = position + end - begin - 1
    return _Spans(stream[run], position // block_size, last // block_size, np.searchsorted(begin, tiles))


def lists_of(partial: Any, full: Any) -> Tiles:
    """The four lists from bool matrices ``[..., n, m]`` of partial and full tiles, numpy arrays or tensors."""
    matrices = partial, full
    if isinstance(partial, Tensor):
        transposed = [x.transpose(-1, -2) for x in matrices]
        return Tiles(_tensor_lists(*matrices), _tensor_lists(*transposed))
    return Tiles(_lists(*matrices), _lists(*(x.swapaxes(-1, -2) for x in matrices)))


def _lists(partial: np.ndarray, full: np.ndarray) -> Lists:
    def ordered(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return x.sum(-1, dtype=np.int32), np.argsort(~x, axis=-1, kind="stable").astype(np.int32)

    return Lists(*ordered(partial), *ordered(full))


def _tensor_lists(partial: Tensor, full: Tensor) -> Lists:
    def compact(x: Tensor) -> Tensor:  # kernels take no other layout
        return x.to(torch.int32, memory_format=torch.contiguous_format)

    def ordered(x: Tensor) -> tuple[Tensor, Tensor]:
        return compact(x.sum(-1)), compact(torch.argsort(x.int(), dim=-1, descending=True, stable=True))

    return Lists(*ordered(partial), *ordered(full))


@lru_cache(maxsize=64)
def tile_lists(call: Call, tile: tuple[int, int] = (TILE, TILE)) -> Tiles:
    """The tiles of a call, as numpy arrays."""
    live, full = live_and_full(call, tile)
    return lists_of(live & ~full, full)


@lru_cache(maxsize=64)
def device_lists(call: Call, tile: tuple[int, int], device: torch.device) -> Tiles:
    """The tiles of a call on a device, for all rows and heads: counts ``[1, 1, n]``, indices ``[1, 1, n, m]``."""
    forward, backward = (
        Lists(*(torch.from_numpy(np.ascontiguousarray(x))[None, None].to(device) for x in lists))
        for lists in tile_lists(call, tile)
    )
    return Tiles(forward, backward)


@lru_cache(maxsize=64)
def _device_matrices(call: Call, tile: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
    """Live and full tiles, and the positions of queries and keys filled up to whole tiles with the last one."""
    live, full = live_and_full(call, tile)
    filled = [
        np.pad(side.positions(), (0, -side.tokens % size), "edge")
        for side, size in zip((call.queries, call.keys), tile)
    ]
    return tuple(torch.from_numpy(x).to(device) for x in (live, full, *filled))


def document_lists(call: Call, tile: tuple[int, int], documents: Tensor) -> Tiles:
    """The tiles of a call when a query sees keys of its own document only: ``[b, 1, n]`` and ``[b, 1, n, m]``.

    Computed on the device of ``documents`` without waiting for it. A tile is left out when the documents of its
    queries end before those of its keys begin, or the other way round; it stays full when all its tokens are of one.

    Args:
        documents: int ``[b, L]``, never falling along a row.
    """
    live, full, *positions = _device_matrices(call, tile, documents.device)
    numbers = [documents[:, x].unflatten(1, (-1, size)) for x, size in zip(positions, tile)]
    query, key = ((x.amin(-1), x.amax(-1)) for x in numbers)  # [b, n] first and last document of each tile
    meet = (query[0][:, :, None] <= key[1][:, None]) & (key[0][:, None] <= query[1][:, :, None])
    one = (query[0] == query[1])[:, :, None] & (key[0] == key[1])[:, None] & (query[0][:, :, None] == key[0][:, None])
    live, full = (live & meet)[:, None], (full & one)[:, None]
    return lists_of(live & ~full, full)


class PerDocuments:
    """Cache of values computed from documents, shared by the layers of a micro-batch.

    A tensor is identified by its memory and its version. The cache keeps it, so that its memory is not reused.
    """

    def __init__(self, size: int = 4):
        self._size = size
        self._kept: OrderedDict[tuple, tuple[Tensor, Any]] = OrderedDict()

    def get(self, documents: Tensor, make: Callable[..., Any], *args: Any) -> Any:
        """``make(*args, documents)``, or its cached value for equal ``args`` and the same documents."""
        version = 0 if documents.is_inference() else documents._version
        key = (make, args, documents.data_ptr(), version, documents.shape, documents.stride(), documents.dtype)
        if key not in self._kept:
            self._kept[key] = documents, make(*args, documents)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key][1]
