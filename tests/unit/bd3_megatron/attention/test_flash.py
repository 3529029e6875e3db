"""FlashAttention-4: its predicate evaluated in plain integers, and the names it is called by."""

from __future__ import annotations

import inspect
import sys
import types
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from bd3_megatron.attention import flash_attention
from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.mask import Streams, dense_mask
from bd3_megatron.attention.tiles import Call, device_lists
from tests.unit.bd3_megatron.attention.dense import attend, reference


@pytest.fixture
def plain_integers(monkeypatch):
    """CuTe's types as Python's, and none of what was made with the others."""
    cutlass, utils = types.ModuleType("cutlass"), types.ModuleType("flash_attn.cute.utils")
    cutlass.Int32, cutlass.Boolean = int, bool
    utils.scalar_to_ssa = lambda value, kind: kind(value)
    names = {"cutlass": cutlass, "flash_attn": types.ModuleType("flash_attn")}
    names |= {"flash_attn.cute": types.ModuleType("flash_attn.cute"), "flash_attn.cute.utils": utils}
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    flash_attention.mask_mod.cache_clear()
    yield
    flash_attention.mask_mod.cache_clear()


KINDS = [
    (Streams(24, 4, 2, 24), 1),
    (Streams(24, 4, 1, 20), 1),
    (Streams(24, 24, 2, 0), 1),
    (Streams(12, 1, 0, 12), 1),
    (Streams(24, 3, 2, 24), 2),
    (Streams(24, 24, 2, 0), 2),
    (Streams(12, 1, 0, 12), 2),
]


@pytest.mark.parametrize("documented", [False, True])
@pytest.mark.parametrize(("streams", "ranks"), KINDS)
def test_the_predicate_of_the_kernel_is_the_mask(plain_integers, streams, ranks, documented):
    documents = torch.tensor([[0] * 5 + [1] * (streams.length - 5), [3] * streams.length]).int()
    mask = dense_mask(streams, documents=documents if documented else None).expand(2, -1, -1)
    for rank in range(ranks):
        shard = ContextShard(streams.length, ranks, rank)
        noisy = [torch.arange(streams.length) + k * streams.length for k in range(streams.noisy)]
        clean = torch.arange(streams.clean) + streams.noisy * streams.length
        held = [shard.take(x, 0) for x in noisy]
        queries = torch.cat([*held, shard.take(clean, 0) if streams.clean else clean])
        keys = torch.cat([*(held if streams.clean else noisy), clean])
        call = Call.of(streams, len(queries), shard)
        seen = flash_attention.mask_mod(call, documented)
        found = [
            [[seen([row], [0], [i], [j], None, [documents]) for j in range(len(keys))] for i in range(len(queries))]
            for row in range(2)
        ]
        assert torch.equal(torch.tensor(found), mask[:, queries][:, :, keys])


def test_a_kernel_is_known_by_its_call_in_every_process(plain_integers):
    several = [Streams(256, size, 1, 256) for size in (4, 16)]
    calls = [Call.of(streams, queries) for streams in several for queries in (256, 512)]

    def names() -> list[str]:
        return [
            flash_attention.mask_mod(call, documents).__cute_hash__ for call in calls for documents in (False, True)
        ]

    first, one = names(), flash_attention.mask_mod(calls[0], False)
    assert flash_attention.mask_mod(Call.of(Streams(256, 4, 1, 256), 256), False) is one
    flash_attention.mask_mod.cache_clear()
    assert flash_attention.mask_mod(calls[0], False) is not one
    assert names() == first
    assert len(set(first)) == 8


def written_out(q, k, v, *, softmax_scale, mask_mod, aux_tensors, pack_gqa, block_sparse_tensors, **more):
    """What the package's function computes of ``[b, l, n, d]`` from what it is given, by the book."""
    lists, backward = block_sparse_tensors, more.pop("block_sparse_tensors_bwd")
    assert not more
    rows, columns = q.shape[1], k.shape[1]

    def spread(count: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        listed = torch.arange(index.shape[-1]) < count[..., None]
        return torch.zeros_like(listed).scatter(-1, index.long(), listed)

    kinds = [spread(*lists[:2]), spread(*lists[2:4])]
    assert torch.equal(spread(*backward[:2]).mT, kinds[0])
    assert torch.equal(spread(*backward[2:4]).mT, kinds[1])
    height, width = lists.block_size
    partial, full = (x.repeat_interleave(height, -2).repeat_interleave(width, -1) for x in kinds)
    seen = [
        [[mask_mod([b], [0], [i], [j], None, aux_tensors) for j in range(columns)] for i in range(rows)]
        for b in range(len(q))
    ]
    mask = partial & torch.tensor(seen)[:, None] | full
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2), None


@pytest.mark.parametrize("documented", [False, True])
@pytest.mark.parametrize("noisy_only", [False, True])
@pytest.mark.parametrize("streams", [Streams(16, 2, 2, 16), Streams(16, 8, 1, 8), Streams(16, 16, 2, 0)])
def test_the_kernels_are_given_what_gives_the_reference(plain_integers, monkeypatch, streams, noisy_only, documented):
    sys.modules["flash_attn.cute"].flash_attn_func = written_out
    monkeypatch.setattr(flash_attention, "tile_of", lambda device: (8, 4))
    monkeypatch.setattr(flash_attention, "block_sparse", lambda lists, tile: SparseLists(*lists, tile))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(streams.tokens, 2, n, 8, generator=generator) for n in (4, 2, 2))
    documents = torch.tensor([[0] * 5 + [1] * 11, [3] * 16]).int() if documented else None
    query = query[: streams.predicting] if noisy_only else query
    found = attend("flash", [query, key, value], streams, 0.4, documents=documents)
    torch.testing.assert_close(found, reference(query, key, value, streams, 0.4, documents=documents))


class SparseLists(NamedTuple):
    """The fields of the package's own tuple that are used, by the same names and in the same order."""

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]


class TestThePackage:
    """Against the package itself, where it can be imported; its kernels need a GPU."""

    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")

    def test_has_the_names_it_is_called_by(self):
        from flash_attn.cute import flash_attn_func

        names = {"softmax_scale", "pack_gqa", "mask_mod", "aux_tensors", "causal"}
        names |= {"block_sparse_tensors", "block_sparse_tensors_bwd"}
        assert names <= set(inspect.signature(flash_attn_func).parameters)

    def test_takes_the_lists_of_either_pass(self):
        from flash_attn.cute import block_sparsity

        streams = Streams(256, 4, 1, 256)
        call = Call.of(streams, streams.length)  # 2 tiles of queries, 4 of keys
        tiles = device_lists(call, (128, 128), torch.device("cpu"))
        forward, backward = (flash_attention.block_sparse(lists, (128, 128)) for lists in tiles)
        sizes = {"batch_size": 2, "num_head": 4, "seqlen_q": 256, "seqlen_k": 512}
        shapes = block_sparsity.infer_block_sparse_expected_shapes(
            forward, m_block_size=128, n_block_size=128, q_stage=1, context="", sparse_block_size_q=128, **sizes
        )
        assert shapes == ((2, 4, 2), (2, 4, 2, 4), 1)
        shapes = block_sparsity.get_block_sparse_expected_shapes_bwd(
            m_block_size=64, n_block_size=128, q_subtile_factor=2, **sizes
        )
        assert shapes == ((2, 4, 4), (2, 4, 4, 2))
        assert backward.mask_block_idx.shape == (1, 1, *shapes[1][2:])

    def test_tells_predicates_apart(self):
        from flash_attn.cute.utils import hash_callable

        several = [Streams(256, size, 1, 256) for size in (4, 16)]
        calls = [Call.of(streams, queries) for streams in several for queries in (256, 512)]
        hashes = [
            hash_callable(flash_attention.mask_mod(call, documents)) for call in calls for documents in (False, True)
        ]
        assert len(set(hashes)) == 8
