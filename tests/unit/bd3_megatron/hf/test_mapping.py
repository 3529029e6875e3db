"""The weight maps: exact inverses of each other, the model file's own names, one-line errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd3_common.errors import ConfigError
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.hf.formats import TokenIds
from bd3_megatron.hf.formats.bd3 import hf_config
from bd3_megatron.hf.mapping import entries, from_hf, to_hf
from bd3_megatron.hf.modeling_bd3 import BD3Config, BD3ForMaskedLM

TOY = ModelConfig(layers=2, hidden=16, heads=4, kv_heads=2, head_dim=6, ffn_hidden=24, length=8, vocab_size=11)


@st.composite
def models(draw) -> ModelConfig:
    backbone = draw(st.sampled_from(["qwen3", "dit"]))
    groups = draw(st.integers(1, 3))
    heads = groups if backbone == "dit" else groups * draw(st.integers(1, 3))
    return ModelConfig(
        backbone=backbone,
        layers=draw(st.integers(1, 3)),
        hidden=draw(st.integers(1, 9)),
        heads=heads,
        kv_heads=groups,
        head_dim=2 * draw(st.integers(1, 3)),
        ffn_hidden=draw(st.integers(1, 9)),
        length=8,
        vocab_size=draw(st.integers(2, 13)),
        tie_embeddings=backbone == "qwen3" and draw(st.booleans()),
    )


def random_megatron(model: ModelConfig) -> dict[str, Tensor]:
    return {entry.name: torch.randn(entry.shape) for entry in entries(model)}


@settings(max_examples=50, deadline=None)
@given(models())
def test_maps_are_exact_inverses(model):
    megatron = random_megatron(model)
    hf = to_hf(megatron, model)
    back = from_hf(hf, model)
    assert back.keys() == megatron.keys()
    assert all(torch.equal(back[name], megatron[name]) for name in megatron)
    again = to_hf(back, model)
    assert all(torch.equal(again[name], hf[name]) for name in hf)


@settings(max_examples=20, deadline=None)
@given(models())
def test_hf_names_and_shapes_are_those_of_the_model_file(model):
    config = hf_config(model, DiffusionConfig(), TokenIds(None, None, model.vocab_size - 1), torch.float32)
    with torch.device("meta"):
        state = BD3ForMaskedLM(BD3Config(**config)).state_dict()
    if model.tie_embeddings:
        del state["lm_head.weight"]
    expected = {name: tuple(x.shape) for name, x in state.items()}
    assert {name: shape for entry in entries(model) for name, shape in entry.exported.items()} == expected


def test_qkv_rows_are_grouped_and_gate_is_above_up():
    hf = to_hf(random_megatron(TOY), TOY)
    layer = "model.layers.1.self_attn."
    for name, first in (("q", 0), ("k", 1000), ("v", 2000)):
        weight = hf[f"{layer}{name}_proj.weight"]
        rows = torch.arange(len(weight), dtype=torch.float32) + first
        hf[f"{layer}{name}_proj.weight"] = rows[:, None].expand_as(weight)
    megatron = from_hf(hf, TOY)
    rows = megatron["decoder.layers.1.self_attention.linear_qkv.weight"][:, 0].tolist()
    q, k, v = (list(range(first, first + 24)) for first in (0, 1000, 2000))
    assert rows == q[:12] + k[:6] + v[:6] + q[12:] + k[6:12] + v[6:12]
    gate, up = (hf[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(megatron["decoder.layers.0.mlp.linear_fc1.weight"], torch.cat([gate, up]))


def test_gradients_flow_through_both_maps():
    megatron = {name: x.requires_grad_() for name, x in random_megatron(TOY).items()}
    back = from_hf(to_hf(megatron, TOY), TOY)
    cotangents = {name: torch.randn_like(x) for name, x in back.items()}
    torch.stack([(back[name] * cotangents[name]).sum() for name in back]).sum().backward()
    assert all(torch.equal(x.grad, cotangents[name]) for name, x in megatron.items())


def test_a_missing_an_unknown_and_a_misshaped_weight_are_told():
    weights = random_megatron(TOY)
    short = {name: x for name, x in weights.items() if "layernorm" not in name}
    with pytest.raises(ConfigError, match=r"^weights: decoder\.layers\.0\.input_layernorm\.weight and 7 more missing"):
        to_hf(short, TOY)
    with pytest.raises(ConfigError, match=r"^weights: output_layer\.bias unknown; "):
        to_hf(weights | {"output_layer.bias": torch.zeros(11)}, TOY)
    with pytest.raises(ConfigError, match=r"^weights: final_norm\.weight has shape \[17\], the model needs \[16\]"):
        to_hf(weights | {"final_norm.weight": torch.zeros(17)}, TOY)
    with pytest.raises(ConfigError, match=r"^weights: model\.embed_tokens\.weight and \d+ more missing"):
        from_hf({}, TOY)


def test_the_vocabulary_must_be_known():
    with pytest.raises(ConfigError, match=r"^model\.vocab_size=null: "):
        entries(ModelConfig())
