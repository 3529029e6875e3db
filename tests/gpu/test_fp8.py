"""Transformer Engine layers and FP8 on a GPU, against Megatron's own layers in bf16.

Tolerances are relative errors of whole tensors, ``|a - b| / |b|``. e4m3 rounds to 1/16 and e5m2 to 1/8 of a value, so
that a product of two rounded matrices is off by about 5 % of its norm, and gradients that pass through four layers by
twice that.
"""

from __future__ import annotations

import gc
from functools import cache

import pytest
import torch

from bd3_megatron.config import (
    DiffusionConfig,
    Fp8Config,
    KernelConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
)
from bd3_megatron.engine.megatron import MegatronEngine
from bd3_megatron.engine.stage import named_parameters
from bd3_megatron.layers import transformer_engine as te
from pretrain.checkpoint.reader import find_checkpoint, restore
from pretrain.checkpoint.writer import save_checkpoint
from tests.unit import tiny

REASON = te.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"Transformer Engine: {REASON}")

BF16, FP8_LOSS, FP8_GRADIENT = 0.02, 0.02, 0.25
LOCAL, TE = KernelConfig(layers="local", fusions=False), KernelConfig(layers="te")
DIFFUSION = DiffusionConfig(block_size=16)
RECIPES = ("current", "delayed", "block")


@pytest.fixture
def recipe(request) -> Fp8Config:
    """The recipe named by the test's parameter, where this GPU has it."""
    found = Fp8Config(enabled=True, recipe=request.param, amax_history=16)
    try:
        te.check(TE, found)
    except ValueError as error:
        pytest.skip(str(error))
    return found


@pytest.fixture(autouse=True)
def _fresh():
    """Transformer Engine keeps the layers of every model that was ever trained with delayed scaling."""
    yield
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    gc.collect()
    torch.cuda.empty_cache()


@cache
def shape(backbone: str = "qwen3") -> ModelConfig:
    return tiny.shape(backbone, layers=4, hidden=256, heads=4, length=256, ffn_hidden=768)


@cache
def weights(backbone: str) -> dict[str, torch.Tensor]:
    """As initial ones, but with a head that is not zero, so that no gradient is."""
    drawn = tiny.weights_of(shape(backbone))
    return {name: x if "norm" in name else 0.2 * x for name, x in drawn.items()}


def engine(
    world, kernels=TE, fp8: Fp8Config | None = None, backbone="qwen3", parallel: ParallelConfig | None = None, **options
) -> MegatronEngine:
    optimization = OptimizationConfig(**{"beta1": 0.0, "clip_norm": 0.0, "ema_decay": 0.0, **options})
    sections = {"fp8": fp8 or Fp8Config(), "parallel": parallel or ParallelConfig()}
    config = tiny.config(shape(backbone), DIFFUSION, kernels=kernels, optimization=optimization, **sections)
    made = MegatronEngine(config, world)
    made.set_weights(weights(backbone))
    return made


def batches(step: int, backbone: str = "qwen3", rows: int = 4) -> list:
    return [tiny.batch_of(shape(backbone), DIFFUSION, rows, seed) for seed in (2 * step, 2 * step + 1)]


def gradients(made: MegatronEngine, backbone: str = "qwen3") -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of one step without learning: with beta1 = 0 Adam's first moment is the gradient."""
    loss = made.train_step(batches(0, backbone), 0.0).loss
    state = tiny.state(made)
    return loss, {name: x.clone() for name, x in state.items() if name.startswith("exp_avg/")}


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def assert_near(found, expected, loss: float, gradient: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=loss)
    worst = {name: off(found[1][name], x) for name, x in expected[1].items()}
    name = max(worst, key=worst.get)
    assert worst[name] < gradient, f"{name}: {worst[name]:.3f}"


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_the_layers_are_the_same_function_as_the_local_ones(world, backbone):
    local = gradients(engine(world, LOCAL, backbone=backbone), backbone)
    found = gradients(engine(world, TE.model_copy(update={"fusions": False}), backbone=backbone), backbone)
    assert_near(found, local, BF16, BF16)


@pytest.mark.parametrize("layers", ["local", "te"])
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_fusions_change_nothing(world, backbone, layers):
    plain = gradients(engine(world, KernelConfig(layers=layers, fusions=False), backbone=backbone), backbone)
    made = engine(world, KernelConfig(layers=layers), backbone=backbone)
    assert made.config.bias_dropout_fusion
    assert made.config.apply_rope_fusion
    assert_near(gradients(made, backbone), plain, BF16, BF16)


@pytest.mark.parametrize("recipe", RECIPES, indirect=True)
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_loss_and_gradients_are_near_those_of_bf16(world, backbone, recipe):
    expected = gradients(engine(world, LOCAL, backbone=backbone), backbone)
    made = engine(world, TE, recipe, backbone=backbone)
    for _ in range(3 if recipe.recipe == "delayed" else 0):  # delayed scales follow from passes before
        gradients(made, backbone)
    found = gradients(made, backbone)
    assert_near(found, expected, FP8_LOSS, FP8_GRADIENT)
    if recipe.recipe != "delayed":  # and they are not those of bf16: FP8 was used
        name = "exp_avg/decoder.layers.0.mlp.linear_fc1.weight"
        assert off(found[1][name], expected[1][name]) > 0.01


@pytest.mark.parametrize("recipe", RECIPES, indirect=True)
def test_twenty_steps_track_bf16(world, recipe):
    options = {"beta1": 0.9, "clip_norm": 1.0}
    losses = []
    for kernels, fp8 in ((LOCAL, None), (TE, recipe)):
        made = engine(world, kernels, fp8, **options)
        losses.append([made.train_step(batches(step), 1e-3).loss for step in range(20)])
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=FP8_LOSS)


def test_the_first_and_last_layers_may_stay_in_bf16(world):
    expected = gradients(engine(world, LOCAL))
    found = gradients(engine(world, TE, Fp8Config(enabled=True, first_last_bf16=1)))
    assert_near(found, expected, FP8_LOSS, FP8_GRADIENT)


@pytest.mark.parametrize("recipe", ["current", "delayed"], indirect=True)
def test_layers_that_are_computed_again_give_the_same(world, recipe):
    plain = gradients(engine(world, TE, recipe))
    for recompute in ("selective", "full"):
        again = gradients(engine(world, TE, recipe, parallel=ParallelConfig(recompute=recompute)))
        assert_near(again, plain, 1e-3, BF16)


PLAIN_LAST = TE.model_copy(update={"skip_last_clean_queries": False})


def test_the_last_layer_leaves_out_clean_queries(world):
    assert_near(gradients(engine(world, TE)), gradients(engine(world, PLAIN_LAST)), BF16, BF16)


@pytest.mark.parametrize("recipe", RECIPES, indirect=True)
def test_the_last_layer_leaves_out_clean_queries_in_fp8(world, recipe):
    whole = gradients(engine(world, PLAIN_LAST, recipe))
    assert_near(gradients(engine(world, TE, recipe)), whole, FP8_LOSS, FP8_GRADIENT)


@pytest.mark.parametrize("recipe", ["delayed"], indirect=True)
def test_delayed_scales_survive_a_checkpoint_exactly(world, recipe, tmp_path):
    first = engine(world, TE, recipe, beta1=0.9)
    for step in range(3):
        first.train_step(batches(step), 1e-3)
    with first.averaged():
        first.forward(batches(9))  # leaves nothing behind
    save_checkpoint(tmp_path, first, 3, {}, keep=1)
    saved = {name: x.detach().clone() for name, x in tiny.state(first).items()}
    scales = {name for name in saved if name.startswith("fp8/")}
    assert len(scales) == 4 * 4 * 4
    assert any((saved[name] != 1).any() for name in scales if name.endswith("forward/scale"))
    again = engine(world, TE, recipe, beta1=0.9)
    restore(find_checkpoint(tmp_path), again)
    assert all(torch.equal(x, saved[name]) for name, x in tiny.state(again).items())
    went_on = [first.train_step(batches(step), 1e-3).loss for step in (3, 4, 5)]
    resumed = [again.train_step(batches(step), 1e-3).loss for step in (3, 4, 5)]
    assert resumed[0] == went_on[0]
    assert resumed == pytest.approx(went_on, rel=1e-4)  # gradients of attention are summed in any order
    name = "fp8/decoder.layers.2.mlp.linear_fc1/forward/amax_history"
    torch.testing.assert_close(tiny.state(again)[name], tiny.state(first)[name], rtol=0.05, atol=1e-3)


def test_weights_and_head_stay_in_bf16(world):
    made = engine(world, TE, Fp8Config(enabled=True))
    assert {type(p) for _, p, _ in named_parameters(made.modules)} == {torch.nn.Parameter}
    assert {p.dtype for _, p, _ in named_parameters(made.modules)} == {torch.bfloat16}
    assert not hasattr(made.module.output_layer, "fp8_meta")
    made.train_step(batches(0), 1e-3)
    assert all(part.predicted.numel() % 16 == 0 for part in batches(0))


def test_a_partial_micro_batch_is_evaluated(world):
    """One row makes tokens enough for FP8, whatever is left over of an evaluation."""
    made = engine(world, TE, Fp8Config(enabled=True))
    (nll,) = made.forward(batches(0, rows=1)[:1])
    assert torch.isfinite(nll).all()
