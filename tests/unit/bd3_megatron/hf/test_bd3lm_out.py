"""The reference format written: golden checkpoints come back bitwise, trained weights as the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bd3_common.errors import ConfigError
from bd3_megatron.config import DiffusionConfig, ModelConfig
from bd3_megatron.hf.convert import export, format_of, read_checkpoint
from bd3_megatron.hf.files import open_source, read_safetensors
from bd3_megatron.hf.formats import TokenIds
from bd3_megatron.hf.formats.bd3lm import fold_reference
from pretrain.config.source_tokens import ImportChoices
from pretrain.conversion.convert import roundtrip
from tests.unit import tiny

DATA = Path(__file__).parents[3] / "data"
GOLDEN = [DATA / name for name in ("bd3lm_block1.safetensors", "bd3lm_block8.safetensors", "mdlm_len64.safetensors")]


def state_of(path: Path) -> dict[str, torch.Tensor]:
    tensors, _ = read_safetensors(path)
    return {name.removeprefix("weights."): x for name, x in tensors.items() if name.startswith("weights.")}


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_the_golden_checkpoint_comes_back_bitwise(golden):
    ((name, found),) = roundtrip(golden, ImportChoices())
    assert (name, found.largest, found.tensors) == ("bd3lm -> run -> bd3lm", 0, len(state_of(golden)))


def test_trained_weights_fold_back_into_themselves(tmp_path):
    """Weights that have moved since the import; also where a gate is 0, which cannot give them."""
    source = open_source(GOLDEN[1])
    form = format_of(source)
    loaded = form.read(source, TokenIds())
    model, diffusion, weights = loaded
    origin = form.origin(source, loaded, TokenIds())
    moved = {name: x + 0.01 * torch.randn(x.shape) for name, x in weights.items()}
    origin.tensors["output.blocks.0"][2, :5] = 0
    origin.tensors["state.backbone.blocks.0.adaLN_modulation.weight"].view(6, 64, -1)[2, :5] = 0
    origin.tensors["state.backbone.blocks.0.adaLN_modulation.bias"].view(6, 64)[2, :5] = 0
    export(moved, model, diffusion, TokenIds(mask=model.mask_id), None, tmp_path / "out", "bd3lm", origin=origin)
    back = read_checkpoint(tmp_path / "out")[2]
    assert back.keys() == moved.keys()
    for name, weight in moved.items():
        torch.testing.assert_close(back[name], weight, rtol=1e-5, atol=1e-5, msg=name)


def test_a_run_that_was_not_imported_gets_a_condition_that_changes_nothing(tmp_path):
    model = tiny.shape("dit", ffn_hidden=128)
    weights, diffusion = tiny.weights_of(model), DiffusionConfig(block_size=4, beta=0.3, omega=0.8)
    export(weights, model, diffusion, TokenIds(0, 1, tiny.MASK), None, tmp_path / "out", "bd3lm", shard_bytes=20_000)
    again, objective, back = read_checkpoint(tmp_path / "out", tokens=TokenIds(0, 1))
    assert again == model
    assert (objective.block_size, objective.beta, objective.omega) == (4, 0.3, 0.8)
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    folded = fold_reference(open_source(tmp_path / "out").tensors(), again)
    assert all(torch.equal(folded[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "qwen3"}, "format=bd3lm: model.backbone=qwen3: the reference has dit"),
        ({"backbone": "dit", "ffn_hidden": 100}, "format=bd3lm: model.ffn_hidden=100"),
        ({"backbone": "dit", "rope_theta": 5e5}, "format=bd3lm: model.rope_theta=500000"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(reversed(value)),
)
def test_another_model_is_refused_with_the_reason(changes, message, tmp_path):
    model = ModelConfig(layers=1, hidden=32, heads=2, length=8, vocab_size=9, mask_id=8, **changes)
    with pytest.raises(ConfigError, match=message):
        export(tiny.weights_of(model), model, DiffusionConfig(), TokenIds(mask=8), None, tmp_path / "out", "bd3lm")
    assert not list(tmp_path.iterdir())
