"""Flat ranges of shards as chunks of whole tensors."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_megatron import shards
from bd3_megatron.shards import ShardSpec, as_parameter, local_shard, shard_spec, sharded_tensor


@settings(max_examples=300, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), data=st.data())
def test_a_flat_range_is_cut_into_boxes_that_hold_just_its_elements(shape, data):
    count = math.prod(shape)
    start = data.draw(st.integers(0, count))
    end = data.draw(st.integers(start, count))
    whole = torch.arange(count, dtype=torch.float32).view(shape)
    spec = ShardSpec(shape, shape, (0,) * len(shape))
    got = sharded_tensor(whole.flatten()[start:end].clone(), spec, start)
    back = torch.full(shape, -1.0)
    for chunk in got.chunks:
        back[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.data.shape))] = chunk.data
    expected = torch.full((count,), -1.0)
    expected[start:end] = torch.arange(start, end, dtype=torch.float32)
    assert torch.equal(back.flatten(), expected)
    assert sum(chunk.data.numel() for chunk in got.chunks) == end - start
    assert len(got.chunks) <= 2 * len(shape) - 1


class Tensors(SimpleNamespace):
    """Stands in for a process of a tensor-parallel group."""


def on_rank(monkeypatch, rank: int, size: int) -> None:
    group = Tensors(get_tensor_model_parallel_rank=lambda: rank, get_tensor_model_parallel_world_size=lambda: size)
    monkeypatch.setattr(shards, "parallel_state", group)


def tagged(shape: tuple[int, ...], dim: int, stride: int = 1) -> torch.Tensor:
    parameter = torch.zeros(shape)
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, stride
    return parameter


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("whole", "dim", "stride", "rows"),
    [((8, 3), 0, 1, None), ((3, 8), 1, 1, None), ((16, 3), 0, 2, None), ((7, 3), 0, 1, 7), ((5,), 0, 1, 5)],
    ids=["column", "row", "gated", "vocabulary", "vocabulary-bias"],
)
def test_the_ranks_of_a_layout_hold_the_whole_tensor_once(monkeypatch, whole, dim, stride, rows, size, parts):
    """Shards over tensor-parallel ranks, each cut again into flat ranges over data-parallel ranks."""
    full = torch.arange(1, math.prod(whole) + 1, dtype=torch.float32).view(whole)
    padded = -(-whole[dim] // size) * size
    back: torch.Tensor | None = None
    for rank in range(size):
        on_rank(monkeypatch, rank, size)
        shape = [*whole]
        shape[dim] = padded // size
        parameter = tagged(tuple(shape), dim, stride)
        shard = local_shard(full, parameter)
        spec = shard_spec(parameter, rows)
        ends = [shard.numel() * part // parts for part in range(parts + 1)]
        for low, high in itertools.pairwise(ends):
            flat = shard.flatten()[low:high].clone()
            mine = sharded_tensor(flat, spec, low)
            back = torch.zeros(mine.shape) if back is None else back
            for chunk in mine.chunks:
                place = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.data.shape))
                assert not back[place].any()  # no other rank has it
                back[place] = chunk.data
            # and it takes its part back out of the whole
            before = flat.clone()
            for chunk in mine.chunks:
                chunk.data.zero_()
            mine.fill(full)
            assert torch.equal(flat, before)
    assert torch.equal(back.view(whole), full)


def test_one_rank_writes_what_is_replicated(monkeypatch):
    on_rank(monkeypatch, 0, 2)
    assert not shard_spec(torch.zeros(3)).duplicate
    on_rank(monkeypatch, 1, 2)
    assert shard_spec(torch.zeros(3)).duplicate
    assert sharded_tensor(torch.zeros(3), shard_spec(torch.zeros(3))).duplicate


@pytest.mark.parametrize(
    ("name", "stored", "shape"),
    [
        ("decoder.layers.0.mlp.linear_fc1.weight", (2, 3, 4), (6, 4)),
        ("decoder.layers.0.mlp.linear_fc1.bias", (2, 3), (6,)),
        ("decoder.layers.0.mlp.linear_fc1.weight", (3, 4), (3, 4)),
        ("decoder.layers.0.mlp.linear_fc1.bias", (3,), (3,)),
        ("decoder.layers.0.mlp.linear_fc2.weight", (4, 3), (4, 3)),
        ("decoder.layers.0.self_attention.conv.weight", (4, 1, 3), (4, 1, 3)),
        ("decoder.layers.0.mlp.experts.weight", (8, 3, 4), (8, 3, 4)),
        ("bare", (2, 3, 4), (2, 3, 4)),
    ],
)
def test_the_name_decides_whether_a_stored_tensor_is_a_fused_gate_and_up(name, stored, shape):
    whole = torch.arange(math.prod(stored)).view(stored)
    found = as_parameter(name, whole)
    assert tuple(found.shape) == shape
    assert torch.equal(found.flatten(), whole.flatten())
