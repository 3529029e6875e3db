"""FlexAttention's lists and predicate against the dense reference."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from bd3_megatron.attention import flex_attention, tiles
from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.mask import Streams
from bd3_megatron.attention.tiles import Call
from tests.unit.bd3_megatron.attention.dense import reference


@st.composite
def cases(draw):
    """Streams of every kind, a short clean stream, heads in groups, documents or none, all queries or the noisy."""
    kind = draw(st.sampled_from(["blocks", "blocks", "one block", "causal"]))
    size = 1 if kind == "causal" else draw(st.sampled_from([1, 2, 3, 4, 8, 16, 33]))
    length = size * (1 if kind == "one block" else draw(st.integers(2, 8)))
    noisy = 0 if kind == "causal" else draw(st.sampled_from([1, 2, 4]))
    short = draw(st.integers(0, size)) if kind == "blocks" else 0
    streams = Streams(length, size, noisy, 0 if kind == "one block" else length - short)
    groups, repeats, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    documents = None
    if draw(st.booleans()):
        marks = draw(st.lists(st.integers(0, 3), min_size=length * batch, max_size=length * batch))
        documents = (torch.tensor(marks).view(batch, length) == 3).cumsum(1, dtype=torch.int32)
    return streams, batch, groups, groups * repeats, documents, bool(noisy) and draw(st.booleans())


def inputs(streams: Streams, batch: int, groups: int, heads: int, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(streams.tokens, batch, n, width) for n in (heads, groups, groups)]
    return [torch.randn(s, generator=generator, requires_grad=True) for s in shapes]


def prepared(
    qkv: list[Tensor], streams: Streams, context: ContextShard | None = None
) -> tuple[Tensor, Tensor, Tensor, Call]:
    """Queries, keys, values and call, as the backend hands them on."""
    call, key, value = tiles.prepare(*qkv, streams, context or ContextShard(streams.length))
    return qkv[0], key, value, call


def assert_same(found: Tensor, expected: Tensor, qkv: list[Tensor]) -> None:
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(out, qkv, upstream, retain_graph=True) for out in (found, expected)]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(case=cases(), tile=st.sampled_from([4, 8, 16]))
def test_lists_and_predicate_give_the_reference(case, tile):
    streams, batch, groups, heads, documents, noisy_only = case
    query, key, value = qkv = inputs(streams, batch, groups, heads)
    asking = query[: streams.noisy * streams.length] if noisy_only else query
    found = flex_attention.attend(*prepared([asking, key, value], streams), 0.3, documents, tile)
    assert_same(found, reference(asking, key, value, streams, 0.3, documents=documents), qkv)


class OneOfMany(ContextShard):
    """A rank's shard whose ``gather`` takes what the others hold from the whole keys and values, in that order."""

    def holding(self, key: Tensor, value: Tensor, streams: Streams) -> OneOfMany:
        object.__setattr__(self, "whole", [key, value])
        object.__setattr__(self, "streams", streams)
        return self

    def gather(self, x: Tensor) -> Tensor:
        whole = self.whole.pop(0)
        if x.ndim == whole.ndim:  # the clean stream alone
            return whole[self.streams.noisy * self.length :]
        return whole.unflatten(0, (-1, self.length)).transpose(0, 1)


@settings(max_examples=60, deadline=None)
@given(case=cases(), ranks=st.sampled_from([2, 3]), tile=st.sampled_from([4, 8]), marks=st.sets(st.integers(1, 200)))
def test_ranks_that_share_a_row_attend_as_one(case, ranks, tile, marks):
    streams, batch, groups, heads, documents, noisy_only = case
    only_block = not streams.clean
    size = 1 if only_block else streams.block_size
    length = 2 * ranks * size * max(1, streams.length // (2 * ranks * size))
    streams = Streams(length, length if only_block else size, streams.noisy, 0 if only_block else length)
    if documents is not None:
        documents = torch.tensor([[i in marks for i in range(length)]] * batch).cumsum(1, dtype=torch.int32)
    query, key, value = qkv = inputs(streams, batch, groups, heads)
    asked = streams.noisy * length if noisy_only else streams.tokens
    expected = reference(query, key, value, streams, documents=documents)[:asked]
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, qkv, upstream, materialize_grads=True)
    sums = [torch.zeros_like(x) for x in qkv]
    for rank in range(ranks):
        shard = OneOfMany(length, ranks, rank).holding(key, value, streams)

        def held(x: Tensor, shard: ContextShard = shard) -> Tensor:
            return shard.take(x.unflatten(0, (-1, length)), 1).flatten(0, 1)

        mine = [held(x) for x in (query[:asked], key, value)]
        found = flex_attention.attend(*prepared(mine, streams, shard), 8**-0.5, documents, tile)
        torch.testing.assert_close(found, held(expected), rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(found, qkv, held(upstream), materialize_grads=True)
        for total, part in zip(sums, gradients):
            total += part
    for found, one in zip(sums, wanted):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(case=cases(), tile=st.sampled_from([4, 8, 16]))
def test_torch_derives_the_lists_of_the_backward_pass_that_we_have(case, tile):
    """Flex takes its own transpose, FlashAttention takes ours."""
    streams, *_, documents, _ = case
    call, sides = Call.of(streams, streams.tokens), (tile, tile)
    mask = flex_attention.block_mask(call, sides, torch.device("cpu"), documents)
    ours = (
        tiles.device_lists(call, sides, torch.device("cpu"))
        if documents is None
        else tiles.document_lists(call, sides, documents)
    ).backward
    theirs = tiles.Lists(mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices)
    for one, other in zip(theirs, ours):
        assert torch.equal(one, other)


def test_the_kernel_itself_equals_the_reference_where_torch_runs_it(monkeypatch):
    """torch runs FlexAttention eagerly on CPU, dense and by the predicate alone; its refusal of gradients is lifted."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    streams = Streams(24, 4, 2, 20)
    query, key, value = qkv = inputs(streams, 2, 2, 4, width=16)
    documents = torch.tensor([[0] * 10 + [1] * 14, [0] * 24]).int()
    expected = reference(query, key, value, streams, documents=documents)
    monkeypatch.setattr(flex_attention, "_written_out", flex_attention.flex_attention)
    assert_same(flex_attention.attend(*prepared(qkv, streams), 16**-0.5, documents, 8), expected, qkv)


def test_masks_are_made_once_for_all_layers_and_again_for_other_documents():
    call, device = Call.of(Streams(16, 4, 1, 16), 32), torch.device("cpu")
    assert flex_attention.block_mask(call, (8, 8), device) is flex_attention.block_mask(call, (8, 8), device)
    documents = torch.zeros(2, 16, dtype=torch.int32)

    def made() -> BlockMask:
        return flex_attention.block_mask(call, (8, 8), device, documents)

    first = made()
    assert made() is first
    assert flex_attention.block_mask(call, (8, 8), device, documents.view(2, 16)) is first
    documents[:, 8:] = 1  # the same memory, another version
    assert made() is not first
    assert made().kv_num_blocks.sum() < first.kv_num_blocks.sum() + first.full_kv_num_blocks.sum()


def test_micro_batches_with_other_documents_do_not_compile_again():
    streams, compiles = Streams(16, 4, 1, 16), []

    def count(graph, _):
        compiles.append(graph)
        return graph.forward

    compiled = torch.compile(flex_attention.flex_attention, backend=count, dynamic=False, fullgraph=True)
    query, key, value = (x.detach().permute(1, 2, 0, 3) for x in inputs(streams, 2, 1, 2, width=16))
    call = Call.of(streams, streams.tokens)
    for start in range(2, 6):
        documents = (torch.arange(16) >= start).int().expand(2, -1).contiguous()
        mask = flex_attention.block_mask(call, (8, 8), torch.device("cpu"), documents)
        compiled(query, key, value, block_mask=mask, scale=None, enable_gqa=True)
    assert len(compiles) == 1
