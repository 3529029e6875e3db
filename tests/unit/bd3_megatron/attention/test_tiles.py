"""Tile lists against the dense mask: what they leave out is dead, what they call full is live."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_megatron.attention import tiles
from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.mask import Streams, dense_mask, live_pairs
from bd3_megatron.attention.tiles import Call, Lists


@st.composite
def calls(draw):
    """Streams of any kind on one rank of one or several, all queries or the noisy ones; indices of both sides."""
    ranks = draw(st.sampled_from([1, 1, 2, 3]))
    kind = draw(st.sampled_from(["blocks", "one block", "causal"]))
    size = 1 if kind == "causal" else draw(st.integers(1, 40))
    if kind == "one block":
        size = 2 * ranks * draw(st.integers(1, 20))
        streams = Streams(size, size, draw(st.integers(1, 3)), 0)
    else:
        length = size * 2 * ranks * draw(st.integers(1, 6))
        short = draw(st.integers(0, size)) if ranks == 1 and kind == "blocks" else 0
        streams = Streams(length, size, 0 if kind == "causal" else draw(st.integers(1, 3)), length - short)
    shard = ContextShard(streams.length, ranks, draw(st.integers(0, ranks - 1)))
    noisy_only = bool(streams.noisy) and draw(st.booleans())
    return streams, shard, noisy_only


def indices(streams: Streams, shard: ContextShard, noisy_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the N tokens are the queries and the keys of a call, from what the mask's layout says."""
    noisy = [torch.arange(streams.length) + k * streams.length for k in range(streams.noisy)]
    clean = torch.arange(streams.clean) + streams.noisy * streams.length
    held = [shard.take(x, 0) for x in noisy]
    if shard.size > 1:
        own_clean = shard.take(clean, 0) if streams.clean else clean
    else:
        own_clean = clean
    queries = torch.cat(held if noisy_only else [*held, own_clean])
    keys = torch.cat([*(noisy if streams.block_size == streams.length else held), clean])
    return queries, keys


def expand(lists: Lists, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrices of partial and full tiles."""
    found = np.zeros((2, rows, columns), bool)
    for kind, (counts, order) in enumerate([(lists.partial_count, lists.partial), (lists.full_count, lists.full)]):
        for row in range(rows):
            found[kind, row, order[row, : counts[row]]] = True
            assert (np.diff(order[row, : counts[row]]) > 0).all()
    return found[0], found[1]


@settings(max_examples=150, deadline=None)
@given(case=calls(), tile=st.tuples(st.sampled_from([2, 8, 16, 24]), st.sampled_from([3, 8, 16])))
def test_lists_and_predicate_make_the_dense_mask(case, tile):
    streams, shard, _ = case
    queries, keys = indices(*case)
    mask = dense_mask(streams)[queries][:, keys].numpy()
    call = Call.of(streams, len(queries), shard)
    assert (call.queries.tokens, call.keys.tokens) == mask.shape

    index = torch.arange(len(queries))[:, None], torch.arange(len(keys))[None]
    predicate = torch.as_tensor(call.sees(*index, torch.where)).numpy()
    assert np.array_equal(np.broadcast_to(predicate, mask.shape), mask)

    rows, columns = -(-mask.shape[0] // tile[0]), -(-mask.shape[1] // tile[1])
    found = tiles.tile_lists(call, tile)
    partial, full = expand(found.forward, rows, columns)
    padded = np.pad(mask, [(0, -n % size) for n, size in zip(mask.shape, tile)])  # what is beyond the edge is dead
    parts = padded.reshape(rows, tile[0], columns, tile[1])
    assert np.array_equal(full, parts.all((1, 3)))
    assert np.array_equal(partial, parts.any((1, 3)) & ~full)
    back_partial, back_full = expand(found.backward, columns, rows)
    assert np.array_equal(back_partial.T, partial)
    assert np.array_equal(back_full.T, full)


@pytest.mark.parametrize(("length", "overhead"), [(1024, 1.245), (2048, 1.123), (4096, 1.061), (8192, 1.031)])
def test_tiles_of_128_waste_little(length, overhead):
    """At 4 tokens per block; figures counted by hand from the rule that a tile of noisy queries needs itself, its
    clean tile and the clean tiles before, and one of clean queries all clean ones up to its own."""
    streams, n = Streams(length, 4, 1, length), length // 128
    found = tiles.tile_lists(Call.of(streams, streams.tokens)).forward
    assert found.full_count.tolist() == [*range(n), *range(n)]
    assert found.partial_count.tolist() == [2] * n + [1] * n
    visited = found.full_count.sum() + found.partial_count.sum()
    assert visited * 128**2 / live_pairs(streams) == pytest.approx(overhead, abs=1e-3)


def test_blocks_of_whole_tiles_have_no_partial_tile():
    streams, c, n = Streams(2048, 256, 1, 2048), 2, 16
    found = tiles.tile_lists(Call.of(streams, streams.tokens)).forward
    assert not found.partial_count.any()
    noisy = [c + c * (i // c) for i in range(n)]
    assert found.full_count.tolist() == [*noisy, *(c * (i // c + 1) for i in range(n))]


def test_the_last_clean_tile_is_read_by_nobody():
    streams = Streams(1024, 128, 1, 1024)
    backward = tiles.tile_lists(Call.of(streams, streams.length)).backward  # noisy queries
    assert backward.full_count.tolist() == [1] * 8 + [7, 6, 5, 4, 3, 2, 1, 0]


@settings(max_examples=50, deadline=None)
@given(case=calls(), tile=st.tuples(st.sampled_from([4, 16]), st.sampled_from([8, 16])), seed=st.integers(0, 99))
def test_documents_take_tiles_away_and_never_a_pair(case, tile, seed):
    streams, shard, _ = case
    generator = torch.Generator().manual_seed(seed)
    documents = (torch.rand(2, streams.length, generator=generator) < 4 / streams.length).cumsum(1, dtype=torch.int32)
    queries, keys = indices(*case)
    masks = dense_mask(streams, documents=documents)[:, queries][:, :, keys].numpy()
    call = Call.of(streams, len(queries), shard)
    found = tiles.document_lists(call, tile, documents)
    assert all(x.is_contiguous() and x.dtype == torch.int32 for lists in found for x in lists)
    plain = tiles.tile_lists(call, tile)
    rows, columns = plain.forward.partial.shape
    allowed = np.logical_or(*expand(plain.forward, rows, columns))
    for row in range(2):
        partial, full = expand(Lists(*(x[row, 0].numpy() for x in found.forward)), rows, columns)
        back = expand(Lists(*(x[row, 0].numpy() for x in found.backward)), columns, rows)
        assert np.array_equal(back[0].T, partial)
        assert np.array_equal(back[1].T, full)
        assert not (~allowed & (partial | full)).any()
        covered = np.kron(partial | full, np.ones(tile, bool))[: len(queries), : len(keys)]
        assert not (masks[row] & ~covered).any()
        sure = np.kron(full, np.ones(tile, bool))[: len(queries), : len(keys)]
        assert not (sure & ~masks[row]).any()


def test_documents_shorter_than_the_row_cost_fewer_tiles():
    streams = Streams(4096, 4, 1, 4096)
    call = Call.of(streams, streams.tokens)
    documents = (torch.arange(4096) // 512)[None].int()
    one, many = (tiles.document_lists(call, (128, 128), x).forward for x in (documents * 0, documents))
    assert torch.equal(one.full_count[0, 0], torch.from_numpy(tiles.tile_lists(call).forward.full_count))
    assert int(many.full_count.sum() + many.partial_count.sum()) == 8 * (2 * 10 + 4)
    assert int(many.full_count.sum()) == 8 * 2 * 6  # between tiles of one document nothing is masked


def test_a_number_of_queries_that_fits_no_streams_is_refused():
    with pytest.raises(ValueError, match="7 queries are neither"):
        Call.of(Streams(16, 4, 1, 16), 7)


def test_on_a_device_lists_are_made_once():
    call = Call.of(Streams(512, 4, 2, 512), 512 * 3)
    first = tiles.device_lists(call, (128, 128), torch.device("cpu"))
    assert first is tiles.device_lists(Call.of(Streams(512, 4, 2, 512), 512 * 3), (128, 128), torch.device("cpu"))
    assert [x.shape for x in first.backward] == [(1, 1, 12), (1, 1, 12, 12)] * 2
    assert all(x.dtype == torch.int32 for lists in first for x in lists)
