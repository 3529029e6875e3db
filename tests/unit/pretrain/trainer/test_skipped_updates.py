"""A step whose loss or gradient is not finite changes nothing that training goes on from."""

from __future__ import annotations

import math

import pytest
import torch

from bd3_megatron.config import DiffusionConfig
from bd3_megatron.engine.scaling import Fp8State
from bd3_megatron.parallel import seed_dropout
from pretrain.checkpoint.reader import find_checkpoint, restore
from pretrain.checkpoint.writer import save_checkpoint
from tests.unit import tiny

DIFFUSION = DiffusionConfig(block_size=4)


def made(world, precision: str = "fp32", **options):
    model = tiny.shape(dropout=0.2)
    return tiny.engine(world, model, DIFFUSION, precision=precision, ema_decay=0.9, **options)


def step(engine, number: int, spoiled: dict[int, float] | None = None):
    """Train on the two micro-batches of a step; ``spoiled`` micro-batches have a weight of this value."""
    seed_dropout(0, number)
    batches = [tiny.batch_of(tiny.shape(), DIFFUSION, 2, 10 * number + micro) for micro in range(2)]
    for micro, value in (spoiled or {}).items():
        weight = batches[micro].weight
        weight.view(-1)[weight.flatten().nonzero()[0]] = value
    return engine.train_step(batches, 1e-2)


def copied(engine) -> dict[str, torch.Tensor]:
    """All that decides the next step: the state, what the model computes with, and Adam's counters."""
    found = {name: x.detach().clone() for name, x in tiny.state(engine).items()}
    found |= {f"model/{name}": p.detach().clone() for name, p in engine.module.named_parameters()}
    for part in engine.optimizer.chained_optimizers:
        for number, slots in enumerate(part.optimizer.state.values()):
            found[f"count/{number}"] = slots["step"].clone()
    return found


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_all_bit_for_bit_as_it_was(world, precision, clip, value):
    engine = made(world, precision, clip_norm=clip)
    assert step(engine, 1).applied
    before, updates = copied(engine), engine.updates
    result = step(engine, 2, {1: value})
    assert not result.applied
    assert not math.isfinite(result.loss)
    assert not math.isfinite(result.grad_norm)
    assert result.nonfinite_batches == (1,)
    after = copied(engine)
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert engine.updates == updates == 1


def test_a_gradient_that_overflows_under_a_finite_loss_is_not_applied(world):
    engine = made(world)
    # The sum of squares of these gradients is beyond fp32, the loss is not.
    result = step(engine, 1, {0: 1e30})
    assert math.isfinite(result.loss)
    assert not math.isfinite(result.grad_norm)
    assert (result.applied, result.nonfinite_batches, engine.updates) == (False, (), 0)


def test_a_loss_that_is_not_finite_has_no_gradient(world, monkeypatch):
    """Whatever the model makes of it: here the loss is infinite and its gradient would be finite."""
    engine = made(world)
    forward = type(engine.module).forward
    monkeypatch.setattr(type(engine.module), "forward", lambda *args, **options: forward(*args, **options) + math.inf)
    result = step(engine, 1)
    assert (result.loss, result.applied) == (math.inf, False)
    assert math.isnan(result.grad_norm)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_goes_on_as_if_the_step_had_been_left_out(world, precision):
    skipping, without = made(world, precision), made(world, precision)
    step(skipping, 1), step(without, 1)
    step(skipping, 2, {0: math.nan})
    for number in (3, 4):
        assert step(skipping, number) == step(without, number)
    one, other = copied(skipping), copied(without)
    assert all(torch.equal(x, other[name]) for name, x in one.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_after_a_skipped_step_goes_on_bit_for_bit(world, tmp_path, precision):
    engine = made(world, precision)
    step(engine, 1), step(engine, 2, {0: math.nan})
    save_checkpoint(tmp_path, engine, 2, {"updates": engine.updates}, keep=1)
    resumed = made(world, precision)
    restore(find_checkpoint(tmp_path), resumed)
    assert resumed.updates == 1
    for number in (3, 4):
        assert step(resumed, number) == step(engine, number)
    one, other = copied(resumed), copied(engine)
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def test_a_checkpoint_that_does_not_say_counts_every_step(world, tmp_path):
    engine = made(world)
    step(engine, 1), step(engine, 2)
    save_checkpoint(tmp_path, engine, 2, {}, keep=1)
    resumed = made(world)
    restore(find_checkpoint(tmp_path), resumed)
    assert resumed.updates == 2


def test_histories_of_fp8_forget_what_is_not_finite():
    state = Fp8State()
    state.tensors = {
        "layer/forward/amax_history": torch.tensor([[1.0, math.inf], [math.nan, 2.0]]),
        "layer/forward/scale": torch.tensor([3.0, 4.0]),
    }
    state.forget_overflow()
    assert state.tensors["layer/forward/amax_history"].tolist() == [[1.0, 0.0], [0.0, 2.0]]
    assert state.tensors["layer/forward/scale"].tolist() == [3.0, 4.0]
