"""Layouts: which are refused, with what to use instead, and how layers are split over stages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_common.errors import ConfigError
from bd3_megatron.config import EngineConfig, ModelConfig
from bd3_megatron.layout import check_layout, split_layers

MODEL = ModelConfig(layers=6, hidden=64, heads=8, kv_heads=4, ffn_hidden=192, length=64)


def check(
    world: int, model: ModelConfig = MODEL, block_size: int = 4, stage: int = 0, offload: bool = False, **parallel
) -> int:
    zero = {"stage": stage, "offload": offload}
    config = EngineConfig(model=model, diffusion={"block_size": block_size}, parallel=parallel, zero=zero)
    return check_layout(config, world)


@settings(max_examples=200, deadline=None)
@given(
    stages=st.integers(1, 12),
    more=st.integers(0, 40),
    embedding=st.integers(0, 4),
    head=st.integers(0, 4),
)
def test_no_split_has_a_lighter_heaviest_stage(stages, more, embedding, head):
    layers = stages + more
    counts = split_layers(layers, stages, embedding, head)
    assert len(counts) == stages
    assert sum(counts) == layers
    assert min(counts) >= 1
    loads = [*counts]
    loads[0] += embedding
    loads[-1] += head
    # With a lower bound on every load, layers would be left over.
    most = max(loads) - 1
    extra = [0] * stages
    extra[0] += embedding
    extra[-1] += head
    assert sum(max(1, most - x) for x in extra) < layers or any(1 + x > most for x in extra)


@pytest.mark.parametrize(
    ("layers", "stages", "weights", "expected"),
    [
        (8, 4, (0, 0), [2, 2, 2, 2]),
        (7, 2, (0, 0), [4, 3]),
        (10, 4, (0, 0), [2, 3, 3, 2]),
        (10, 4, (1, 1), [2, 3, 3, 2]),
        (30, 4, (1, 1), [7, 8, 8, 7]),
        (12, 4, (0, 2), [3, 4, 4, 1]),
        (4, 4, (5, 5), [1, 1, 1, 1]),
    ],
)
def test_splits_by_hand(layers, stages, weights, expected):
    assert split_layers(layers, stages, *weights) == expected


def test_a_stage_needs_a_layer():
    with pytest.raises(ValueError, match="3 layers cannot fill 4 stages"):
        split_layers(3, 4)


@pytest.mark.parametrize(
    ("world", "layout", "data"),
    [
        (8, {}, 8),
        (8, {"tensor": 4}, 2),
        (8, {"tensor": 2, "context": 2}, 2),
        (12, {"pipeline": 4}, 3),  # six layers over four stages
        (6, {"pipeline": 3, "interleave": 2}, 2),
        (4, {"tensor": 2, "stage": 3}, 2),
        (4, {"pipeline": 2, "stage": 1}, 2),
        (8, {"context": 8}, 1),
    ],
)
def test_what_fits(world, layout, data):
    assert check(world, **layout) == data


TIED = ModelConfig(layers=6, hidden=64, heads=8, length=64, tie_embeddings=True)
REFUSED = [
    (8, {"tensor": 3}, "parallel.tensor=3: model.heads=8 is not divisible by 3; use 1, 2 or 4"),
    (8, {"tensor": 8}, "parallel.tensor=8: model.kv_heads=4 is not divisible by 8; use 1, 2 or 4"),
    (
        6,
        {"tensor": 2, "context": 2},
        "parallel.tensor=2, parallel.pipeline=1, parallel.context=2: their product 4 does not divide the world of 6 "
        "processes; start a multiple of 4, or use a product of 1, 2, 3 or 6",
    ),
    (
        3,
        {"context": 3},
        "parallel.context=3: model.length=64 does not make 6 chunks of whole blocks (diffusion.block_size=4); "
        "use 1, 2, 4 or 8",
    ),
    (8, {"pipeline": 8}, "parallel.pipeline=8: model.layers=6 cannot fill 8 stages; use 1, 2, 3, 4, 5 or 6"),
    (
        4,
        {"pipeline": 4, "interleave": 2},
        "parallel.pipeline=4: model.layers=6 cannot fill 8 stages (parallel.interleave=2); use 2 or 3",
    ),
    (
        4,
        {"pipeline": 2, "interleave": 4},
        "parallel.pipeline=2: model.layers=6 cannot fill 8 stages (parallel.interleave=4); use parallel.interleave=3 "
        "or less",
    ),
    (
        1,
        {"interleave": 2},
        "parallel.interleave=2: parallel.pipeline=1 has nothing to interleave; use parallel.interleave=1 or "
        "parallel.pipeline=2 and more",
    ),
    (
        4,
        {"pipeline": 2, "stage": 2},
        "zero.stage=2: does not work with parallel.pipeline=2; use zero.stage=1 or zero.stage=0 with "
        "parallel.distributed_optimizer=true (ZeRO-1 of the Megatron engine)",
    ),
    (
        2,
        {"context": 2, "stage": 1},
        "zero.stage=1: does not work with parallel.context=2; use zero.stage=0 with "
        "parallel.distributed_optimizer=true (ZeRO-1 of the Megatron engine)",
    ),
    (
        2,
        {"pipeline": 2, "model": TIED, "stage": 1},
        "zero.stage=1: does not work with model.tie_embeddings=true over stages; use zero.stage=0 with "
        "parallel.distributed_optimizer=true (ZeRO-1 of the Megatron engine)",
    ),
    (
        2,
        {"distributed_optimizer": True, "stage": 1},
        "zero.stage=1: does not work with parallel.distributed_optimizer=true; use one of the two: zero.stage=0 or "
        "parallel.distributed_optimizer=false",
    ),
    (2, {"offload": True}, "zero.offload=true: zero.stage=0 shards nothing; use zero.stage=2 or 3"),
    (
        2,
        {"offload": True, "stage": 1},
        "zero.offload=true: needs the partitioned gradients of zero.stage=2 or 3; use one of them",
    ),
    (
        1,
        {"sequence": True},
        "parallel.sequence=true: parallel.tensor=1 has no group to share the sequence; use parallel.sequence=false or "
        "parallel.tensor=2 and more",
    ),
    (
        2,
        {"tensor": 2, "sequence": True, "model": MODEL.model_copy(update={"length": 63}), "block_size": 9},
        "parallel.sequence=true: the 63 positions of a rank are not divisible by parallel.tensor=2; use another "
        "model.length, or parallel.sequence=false",
    ),
]


@pytest.mark.parametrize(("world", "layout", "line"), REFUSED)
def test_what_does_not_fit_is_refused_with_what_does(world, layout, line):
    with pytest.raises(ConfigError) as caught:
        check(world, **layout)
    assert str(caught.value) == line


@pytest.mark.parametrize(("world", "layout", "line"), [case for case in REFUSED if case[0] == 8])
def test_what_is_named_instead_fits(world, layout, line):
    ((name, _),) = layout.items()
    for value in line.partition("; use ")[2].replace(" or ", ", ").split(", "):
        assert check(int(value), **{name: int(value)}) >= 1


def test_one_block_per_row_is_spread_by_position():
    assert check(4, block_size=64, context=4) == 1
