"""Every backend against the dense reference, and the mask against the sentences that define it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.core import BACKENDS
from bd3_megatron.attention.mask import Streams, dense_mask, live_pairs
from bd3_megatron.attention.reference import attend as reference


@st.composite
def cases(draw):
    """Random lengths, blocks (1 and L included), draws, with and without a clean stream, grouped heads."""
    blocks, size = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 33, 70]))
    noisy = draw(st.integers(0, 2))
    clean = draw(st.booleans()) if noisy and blocks == 1 else True
    groups, repeats = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    batch = draw(st.integers(1, 2))
    return blocks * size, Streams(size, noisy, clean), batch, groups, groups * repeats


def inputs(length, streams, batch, groups, heads, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, streams.count * batch, n, width) for n in (heads, groups, groups)]
    return [torch.randn(s, generator=generator, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - {"reference"}))
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_backend_equals_the_dense_reference(name, case):
    length, streams, batch, groups, heads = case
    qkv = inputs(length, streams, batch, groups, heads)
    expected = reference(*qkv, streams)
    found = BACKENDS[name](*qkv, streams, None)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad(out, qkv, upstream) for out in (expected, found)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(*gradients):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - {"reference"}))
@pytest.mark.parametrize("size", [16, 128, 256])
def test_backend_equals_the_reference_at_a_length_of_many_tiles(name, size):
    streams = Streams(size, 1, True)
    qkv = inputs(1024, streams, 1, 2, 4)
    expected, found = reference(*qkv, streams), BACKENDS[name](*qkv, streams, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(case=cases())
def test_mask_says_what_the_objective_says(case):
    length, streams, *_ = case
    mask = dense_mask(length, streams)
    for q in range(0, len(mask), 1 + len(mask) // 100):
        for k in range(0, len(mask), 1 + len(mask) // 50):
            query_stream, i = q // length, q % length // streams.block_size
            key_stream, j = k // length, k % length // streams.block_size
            query_noisy, key_noisy = query_stream < streams.noisy, key_stream < streams.noisy
            if query_noisy and key_noisy:
                expected = query_stream == key_stream and i == j
            elif query_noisy:
                expected = j < i
            else:
                expected = not key_noisy and j <= i
            assert bool(mask[q, k]) == expected
    assert live_pairs(length, streams) == int(mask.sum())


@pytest.mark.parametrize("name", sorted(BACKENDS))
@settings(max_examples=25, deadline=None)
@given(case=cases(), data=st.data())
def test_no_clean_token_leaks_into_the_past(name, case, data):
    length, streams, batch, groups, heads = case
    if not (streams.clean and streams.noisy):
        return
    blocks = length // streams.block_size
    block = data.draw(st.integers(0, blocks - 1))
    q, k, v = (x.detach().requires_grad_() for x in inputs(length, streams, batch, groups, heads))
    out = BACKENDS[name](q, k, v, streams, None).view(length, streams.count, batch, heads, -1)
    noisy_past = out[: (block + 1) * streams.block_size, : streams.noisy].sum()
    clean_past = out[: block * streams.block_size, streams.noisy :].sum()
    inside = slice(block * streams.block_size, (block + 1) * streams.block_size)
    for gradient in torch.autograd.grad(noisy_past + clean_past, (k, v), materialize_grads=True):
        clean = gradient.view(length, streams.count, batch, groups, -1)[inside, streams.noisy :]
        assert torch.count_nonzero(clean) == 0


# ---- context parallelism, all ranks in one process ----


class OneOfMany(ContextShard):
    """A rank's shard whose ``gather`` takes what the others hold from the whole keys and values, in that order."""

    def holding(self, key: torch.Tensor, value: torch.Tensor, streams: Streams) -> "OneOfMany":
        object.__setattr__(self, "whole", [key, value])
        object.__setattr__(self, "streams", streams)
        return self

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        whole = self.whole.pop(0)
        if whole.numel() // self.length == x.numel() // len(x):
            return whole.view(self.length, *x.shape[1:])
        # Of the clean stream alone, the fourth axis from the end is the batch.
        return whole.view(self.length, self.streams.count, *x.shape[1:])[:, self.streams.clean_index]


@pytest.mark.parametrize("name", sorted(BACKENDS))
@settings(max_examples=40, deadline=None)
@given(case=cases(), size=st.sampled_from([2, 3, 4]), parts=st.integers(1, 3))
def test_ranks_that_share_a_row_attend_as_one(name, case, size, parts):
    """Outputs of all ranks make up the whole, and the gradients that reach keys and values add up."""
    _, streams, batch, groups, heads = case
    only_block = not streams.clean
    length = 2 * size * parts * (1 if only_block else streams.block_size)
    if only_block:
        streams = Streams(length, streams.noisy, clean=False)
    query, key, value = inputs(length, streams, batch, groups, heads)
    expected = reference(query, key, value, streams)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, (query, key, value), upstream)

    sums = [torch.zeros_like(x) for x in (query, key, value)]
    for rank in range(size):
        shard = OneOfMany(length, size, rank).holding(key, value, streams)
        found = BACKENDS[name](*(shard.take(x, 0) for x in (query, key, value)), streams, None, shard)
        torch.testing.assert_close(found, shard.take(expected, 0), rtol=1e-5, atol=1e-5)
        for total, part in zip(sums, torch.autograd.grad(found, (query, key, value), shard.take(upstream, 0))):
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
