"""Every backbone: one table of parameters, the same function in training and in exports, and backbones of plugins."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForMaskedLM

from bd3_common.errors import ConfigError
from bd3_megatron.backbones import BACKBONES, Backbone, Traits
from bd3_megatron.config import DiffusionConfig
from bd3_megatron.cost.partition import parameter_shapes, stage_chunks
from bd3_megatron.engine.stage import build_stage, named_parameters
from bd3_megatron.hf.convert import export, read_checkpoint
from bd3_megatron.hf.formats import TokenIds
from bd3_megatron.hf.mapping import to_hf
from bd3_megatron.hf.modeling_bd3 import TRAITS, token_nll
from tests.unit import tiny

pytestmark = pytest.mark.usefixtures("world")
DIFFUSION = DiffusionConfig(block_size=4)
TOKENS = TokenIds(tiny.BOS, tiny.EOS, tiny.MASK)


class Everything(Backbone):
    """All that the built-in backbones do not combine."""

    traits = Traits("LayerNorm", "gelu_tanh", gated=True, mlp_bias=True, qk_norm=True, head_bias=True, qkv_bias=True)
    norm_eps = 1e-3


class Nothing(Backbone):
    """An ungated MLP without biases."""

    traits = Traits(gated=False)


@pytest.fixture(params=[*BACKBONES.names(), Everything, Nothing], ids=lambda x: x if isinstance(x, str) else x.__name__)
def backbone(request, monkeypatch):
    name = request.param
    if not isinstance(name, str):
        name = name.__name__.lower()
        monkeypatch.setattr(BACKBONES, "_added", {})
        BACKBONES.add(name, request.param)
    yield name
    BACKBONES._instances.clear()


def test_the_table_is_the_model_that_is_built(world, backbone):
    model = tiny.shape(backbone)
    config = tiny.config(model, DIFFUSION)
    ((chunk,),) = stage_chunks(model, config.parallel)
    built = [(name, tuple(x.shape)) for name, x, _ in named_parameters(build_stage(config, world.device))]
    assert list(parameter_shapes(model, chunk).items()) == built
    assert model.parameters(tiny.VOCABULARY) == sum(x.numel() for x in tiny.weights_of(model).values())


def test_loss_and_gradients_equal_those_of_the_shipped_model(backbone):
    model = tiny.shape(backbone)
    weights = {name: x.requires_grad_() for name, x in tiny.weights_of(model).items()}
    batch = tiny.batch_of(model, DIFFUSION, 2)
    ours, plain = tiny.build(model, DIFFUSION, weights), tiny.oracle(model, DIFFUSION, weights)
    noisy, clean = batch.input_ids.chunk(2)
    nll = token_nll(plain(noisy, clean).logits, batch.labels)
    expected = torch.where(noisy == tiny.MASK, batch.weight * nll, 0.0)
    found = ours(batch)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    found.sum().backward()
    expected.sum().backward()
    gradients = to_hf({name: x.grad for name, x, _ in named_parameters([ours])}, model)
    for name, parameter in plain.named_parameters():
        largest = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5 * largest, msg=name)


def test_an_export_carries_the_traits_and_reads_back(backbone, tmp_path):
    model, weights = tiny.shape(backbone), tiny.weights_of(tiny.shape(backbone))
    export(weights, model, DIFFUSION, TOKENS, None, tmp_path / "out")
    again, _, back = read_checkpoint(tmp_path / "out", "bd3")
    assert (again.backbone, again.ffn, again.eps) == (backbone, model.ffn, model.eps)
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.config.traits == asdict(model.traits)
    row = torch.from_numpy(tiny.rows_of(model, 1))
    expected = tiny.oracle(model, DIFFUSION, weights)(row).logits
    assert torch.equal(loaded.eval()(row).logits, expected)
    loaded.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["traits"] == asdict(model.traits)


def test_exports_without_traits_load_as_before(tmp_path):
    """Older exports name their backbone alone."""
    for name, traits in TRAITS.items():
        assert traits == asdict(BACKBONES.instance(name).traits)
        model, out = tiny.shape(name), tmp_path / name
        export(tiny.weights_of(model), model, DIFFUSION, TOKENS, None, out)
        config = json.loads((out / "config.json").read_text())
        del config["traits"]
        (out / "config.json").write_text(json.dumps(config))
        assert read_checkpoint(out, "bd3")[0].backbone == name


def test_an_export_of_other_traits_is_refused(tmp_path):
    model = tiny.shape()
    export(tiny.weights_of(model), model, DIFFUSION, TOKENS, None, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(file.read_text().replace('"qk_norm": true', '"qk_norm": false'))
    with pytest.raises(ConfigError, match=r"config\.json: traits: model\.backbone=qwen3 has others here; load"):
        read_checkpoint(tmp_path / "out", "bd3")


def test_traits_are_known_without_torch():
    code = "import sys, bd3_megatron.config as c; c.ModelConfig().traits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
