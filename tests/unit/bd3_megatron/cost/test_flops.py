"""Counts of operations and parameters against the published table, the mask and the model itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bd3_megatron.attention.mask import Streams, live_pairs
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.cost.flops import (
    forward_flops,
    layer_parameters,
    six_n,
    training_flops_per_token,
)
from tests.unit import tiny

CAUSAL = DiffusionConfig(objective="causal", block_size=1)
SHAPES = {
    "125M": {"backbone": "dit", "layers": 12, "hidden": 768, "heads": 12, "vocab_size": 50258},
    "1.3B": {"backbone": "dit", "layers": 24, "hidden": 2048, "heads": 16, "vocab_size": 50258},
    "7B": {"layers": 32, "hidden": 4096, "heads": 32, "ffn_hidden": 11008, "vocab_size": 32000},
}


def published(name: str, length: int) -> ModelConfig:
    return ModelConfig(length=length, **SHAPES[name])


@pytest.mark.parametrize(
    ("name", "length", "ratio"),
    [
        ("125M", 1024, 1.52),
        ("125M", 8192, 1.65),
        ("1.3B", 1024, 1.85),
        ("1.3B", 8192, 1.88),
        ("7B", 1024, 1.95),
        ("7B", 8192, 1.95),
    ],
)
def test_block_diffusion_relative_to_autoregression(name, length, ratio):
    """The objective's table "Forward FLOPs per data token, relative to AR", its last column."""
    model = published(name, length)
    blocks = forward_flops(model, DiffusionConfig(block_size=4), mask_rate=0.5)
    assert blocks.total / forward_flops(model, CAUSAL).total == pytest.approx(ratio, abs=0.006)


def test_the_closed_form_of_the_small_model():
    """B' = 4 at L = 1024: linear layers of 2 streams less the last clean one, live pairs, half of the head."""
    model = published("125M", 1024)
    h, layers, length, block = 768, 12, 1024, 4
    matrices = 2 * 12 * h * h  # per layer and stream: 4 h^2 of attention and 8 h^2 of MLP, two operations each
    pairs = block + (length - block) / 2
    expected = (
        2 * layers * matrices - 2 * (2 + 8) * h * h,
        (2 * layers - 1) * pairs * 4 * h,
        0.5 * 2 * h * 50258,
    )
    found = forward_flops(model, DiffusionConfig(block_size=block), mask_rate=0.5)
    assert (found.linear, found.attention, found.head) == expected
    assert found.total == sum(expected)
    causal = forward_flops(model, CAUSAL)
    assert (causal.linear, causal.head) == (layers * matrices, 2 * h * 50258)
    assert training_flops_per_token(model, CAUSAL) == 3 * causal.total
    # 6 N is three times two operations per weight that multiplies: a causal model without its attention.
    assert six_n(model) == 3 * (causal.linear + causal.head)


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.integers(1, 20),
    size=st.integers(1, 16),
    draws=st.integers(1, 3),
    layers=st.integers(1, 4),
    causal=st.booleans(),
)
def test_attention_counts_the_pairs_that_the_mask_admits(blocks, size, draws, layers, causal):
    length = max(2, blocks * size)
    diffusion = CAUSAL if causal or length % size else DiffusionConfig(block_size=size, draws=draws)
    model = tiny.shape(layers=layers, length=length)
    streams = Streams.of(diffusion, length)
    pairs = layers * live_pairs(streams)
    if streams.noisy and streams.clean:  # nothing reads what the last layer's clean queries would give
        pairs -= live_pairs(Streams(length, streams.block_size, noisy=0, clean=length))
    per_pair = 4 * model.heads * model.width_per_head
    assert forward_flops(model, diffusion).attention * length == pytest.approx(pairs * per_pair, rel=1e-12)


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("draws", [2, 3, 8])
def test_draws_share_the_clean_stream(draws, block_size):
    """K draws of one clean row cost (K + 1) / 2K of K separate pairs (up to the last layer, where it costs less)."""
    model = tiny.shape(layers=400)
    one = forward_flops(model, DiffusionConfig(block_size=block_size))
    many = forward_flops(model, DiffusionConfig(block_size=block_size, draws=draws))
    for part in ("linear", "attention"):
        share = getattr(many, part) / (draws * getattr(one, part))
        assert share == pytest.approx((draws + 1) / (2 * draws), rel=2e-3)
    assert many.head == pytest.approx(draws * one.head)


def test_the_head_runs_on_the_rows_that_are_masked():
    model = tiny.shape()
    whole = forward_flops(model, CAUSAL).head
    assert forward_flops(model, DiffusionConfig(block_size=1, beta=1.0)).head == whole
    assert forward_flops(model, DiffusionConfig(block_size=4), mask_rate=0.25).head == whole / 4


SIZES = {
    "qwen3": {},
    "tied": {"tie_embeddings": True},
    "wide heads": {"head_dim": 12, "kv_heads": 1, "ffn_hidden": 50},
    "dit": {"backbone": "dit"},
    "dit, wide heads": {"backbone": "dit", "head_dim": 12, "ffn_hidden": 50},
}


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_counted_as_the_model_has_them(name):
    model = tiny.shape(**SIZES[name])
    network = tiny.build(model, DiffusionConfig(block_size=4), tiny.weights_of(model))
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    assert model.parameters(tiny.VOCABULARY) == sum(sizes.values())
    matrices = {name: size for name, size in sizes.items() if "layers.0" in name and "linear" in name}
    weights = sum(size for name, size in matrices.items() if name.endswith("weight"))
    assert sum(layer_parameters(model).values()) == weights


def test_the_papers_small_model_less_what_the_fold_removes():
    """169,627,218 parameters, of which adaLN's (constant) condition and its projections fold away.

    They are: two layers of the condition (256 -> 128 -> 128), per layer 128 -> 6 h, at the end 128 -> 2 h, all with
    biases. The fold adds a bias to each of the 25 norms.
    """
    h, c, layers = 768, 128, 12
    condition = (256 * c + c) + (c * c + c)
    adaln = layers * (c * 6 * h + 6 * h) + c * 2 * h + 2 * h
    norm_biases = (2 * layers + 1) * h
    assert published("125M", 1024).parameters(50258) == 169_627_218 - condition - adaln + norm_biases
