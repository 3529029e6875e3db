"""Every backend against the dense reference, and the mask against the sentences that define it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_megatron.attention import chunked_attention
from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.mask import Streams, dense_mask, live_pairs
from tests.unit.bd3_megatron.attention.dense import ON_CPU, OTHERS, attend, reference


@st.composite
def cases(draw):
    """Random lengths, blocks (1 and L included), draws, with and without a clean stream, grouped heads."""
    blocks, size = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 33, 70]))
    noisy = draw(st.integers(0, 3))
    groups, repeats = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    batch = draw(st.integers(1, 2))
    return streams_of(draw, blocks, size, noisy), batch, groups, groups * repeats


def streams_of(draw, blocks, size, noisy):
    """A clean stream that is whole, ends before its last block or inside it, or that one block does without."""
    length = blocks * size
    ends = [length]
    if noisy:
        ends += [0] if blocks == 1 else [length - size, length - size // 2]
    return Streams(length, size, noisy, draw(st.sampled_from(ends)))


def inputs(streams, batch, groups, heads, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(streams.tokens, batch, n, width) for n in (heads, groups, groups)]
    return [torch.randn(s, generator=generator, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_backend_equals_the_dense_reference(name, case):
    streams, batch, groups, heads = case
    query, *key_value = inputs(streams, batch, groups, heads)
    for asking in {streams.tokens, streams.predicting}:  # all streams, or those that predict alone
        qkv = [query[:asking].detach().requires_grad_(), *key_value]
        expected = reference(*qkv, streams)
        found = attend(name, qkv, streams)
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        gradients = [torch.autograd.grad(out, qkv, upstream) for out in (expected, found)]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for one, other in zip(*gradients):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_chunks_made_of_differentiable_pieces_equal_those_in_place(case):
    """What other devices compute."""
    streams, batch, groups, heads = case
    qkv = inputs(streams, batch, groups, heads)
    upstream = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1))
    found = chunked_attention.attend(*qkv, streams, ContextShard(streams.length))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chunked_attention, "_in_place", lambda *_: False)
        expected = chunked_attention.attend(*qkv, streams, ContextShard(streams.length))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(*(torch.autograd.grad(out, qkv, upstream) for out in (found, expected))):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_predictions_are_those_of_all_queries(case):
    streams, batch, groups, heads = case
    query, key, value = inputs(streams, batch, groups, heads)
    predicting = streams.predicting
    alone = reference(query[:predicting], key, value, streams)
    torch.testing.assert_close(alone, reference(query, key, value, streams)[:predicting], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("size", [16, 128, 256])
def test_backend_equals_the_reference_at_a_length_of_many_tiles(name, size):
    streams = Streams(1024, size, 1, 1024 - size)
    qkv = inputs(streams, 1, 2, 4)
    expected, found = reference(*qkv, streams), attend(name, qkv, streams)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(case=cases())
def test_mask_says_what_the_objective_says(case):
    streams, *_ = case
    mask = dense_mask(streams)
    tokens = [(k, p) for k in range(streams.noisy) for p in range(streams.length)]
    tokens += [("clean", p) for p in range(streams.clean)]
    assert mask.shape == (len(tokens), len(tokens))
    for q in range(0, len(mask), 1 + len(mask) // 100):
        for k in range(0, len(mask), 1 + len(mask) // 50):
            (query_stream, i), (key_stream, j) = ((x, p // streams.block_size) for x, p in (tokens[q], tokens[k]))
            if query_stream != "clean" and key_stream != "clean":
                expected = query_stream == key_stream and i == j
            elif query_stream != "clean":
                expected = j < i
            else:
                expected = key_stream == "clean" and j <= i
            assert bool(mask[q, k]) == expected
    assert live_pairs(streams) == int(mask.sum())


@pytest.mark.parametrize("name", ON_CPU)
@settings(max_examples=25, deadline=None)
@given(case=cases(), data=st.data())
def test_no_clean_token_leaks_into_the_past(name, case, data):
    streams, batch, groups, heads = case
    if not (streams.clean and streams.noisy):
        return
    size, blocks = streams.block_size, streams.length // streams.block_size
    block = data.draw(st.integers(0, blocks - 1))
    q, k, v = (x.detach().requires_grad_() for x in inputs(streams, batch, groups, heads))
    *noisy, clean = streams.parts(attend(name, [q, k, v], streams))
    past = clean[: block * size].sum() + sum(x[: (block + 1) * size].sum() for x in noisy)
    for gradient in torch.autograd.grad(past, (k, v), materialize_grads=True):
        assert torch.count_nonzero(streams.parts(gradient)[-1][block * size : (block + 1) * size]) == 0


# ---- context parallelism, all ranks in one process ----


class OneOfMany(ContextShard):
    """A rank's shard whose ``gather`` finds what it is given a part of among the whole keys and values."""

    def holding(self, key: torch.Tensor, value: torch.Tensor, streams: Streams) -> "OneOfMany":
        whole = [x.unflatten(0, (streams.count, -1)) for x in (key, value)]
        by_position = [x.transpose(0, 1) for x in whole]
        object.__setattr__(self, "whole", [*by_position, *(stream for x in whole for stream in x)])
        return self

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        (found,) = (w for w in self.whole if w.shape[1:] == x.shape[1:] and torch.equal(self.take(w, 0), x))
        return found

    def mine(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's positions of every stream."""
        return self.take(x.unflatten(0, (-1, self.length)), 1).flatten(0, 1)


@pytest.mark.parametrize("name", ON_CPU)
@settings(max_examples=40, deadline=None)
@given(case=cases(), size=st.sampled_from([2, 3, 4]), parts=st.integers(1, 3))
def test_ranks_that_share_a_row_attend_as_one(name, case, size, parts):
    """Outputs of all ranks make up the whole, and the gradients that reach keys and values add up."""
    streams, batch, groups, heads = case
    only_block = not streams.clean
    length = 2 * size * parts * (1 if only_block else streams.block_size)
    block = length if only_block else streams.block_size
    streams = Streams(length, block, streams.noisy, clean=0 if only_block else length)
    query, key, value = inputs(streams, batch, groups, heads)
    for asking in {streams.tokens, streams.predicting}:
        asked = query[:asking].detach().requires_grad_()
        expected = reference(asked, key, value, streams)
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        wanted = torch.autograd.grad(expected, (asked, key, value), upstream)

        sums = [torch.zeros_like(x) for x in (asked, key, value)]
        for rank in range(size):
            shard = OneOfMany(length, size, rank).holding(key, value, streams)
            found = attend(name, [shard.mine(x) for x in (asked, key, value)], streams, None, shard)
            torch.testing.assert_close(found, shard.mine(expected), rtol=1e-5, atol=1e-5)
            for total, part in zip(sums, torch.autograd.grad(found, (asked, key, value), shard.mine(upstream))):
                total += part
        for found, one in zip(sums, wanted):
            torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 6), chunk=st.integers(1, 5))
def test_every_position_lies_on_one_rank_and_work_is_even(size, chunk):
    length = 2 * size * chunk
    positions = [ContextShard(length, size, rank).take(torch.arange(length), 0).tolist() for rank in range(size)]
    assert sorted(p for mine in positions for p in mine) == list(range(length))
    # A query at position p sees about p keys.
    assert len({sum(mine) for mine in positions}) == 1
