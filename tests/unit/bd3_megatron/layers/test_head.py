"""The loss: gathered rows against all rows, empty micro-batches, bf16, and what the engine makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bd3_megatron.config import DiffusionConfig, KernelConfig
from bd3_megatron.diffusion.batches import Batch, causal_batch
from tests.unit import tiny

OBJECTIVES = {
    "blocks": DiffusionConfig(block_size=4),
    "two draws": DiffusionConfig(block_size=4, draws=2),
    "one block": DiffusionConfig(block_size=16),
    "single tokens": DiffusionConfig(block_size=1, beta=1.0),
    "causal": DiffusionConfig(objective="causal", block_size=1),
}
BACKENDS = ("chunked", "reference")


def loss_and_gradients(network, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    loss = network(batch).sum() / batch.tokens
    names, parameters = zip(*network.named_parameters())
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters, materialize_grads=True)))


def without_noise(batch: Batch) -> Batch:
    """The micro-batch (of one noisy draw) in which chance masked nothing."""
    return Batch(batch.labels.repeat(2, 1), batch.labels, torch.zeros_like(batch.weight), batch.tokens)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_gathering_changes_neither_loss_nor_gradients(backbone, backend, objective):
    model, diffusion = tiny.shape(backbone), OBJECTIVES[objective]
    weights, batch = tiny.weights_of(model), tiny.batch_of(model, diffusion, 3)
    (loss, gradients), (plain_loss, plain_gradients) = (
        loss_and_gradients(
            tiny.build(model, diffusion, weights, KernelConfig(attention=backend, masked_rows_only=gathered)), batch
        )
        for gathered in (True, False)
    )
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        largest = plain_gradients[name].abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-5, atol=1e-5 * largest, msg=name)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_a_micro_batch_without_a_masked_row_has_loss_and_gradients_zero(backbone, backend, gathered):
    model, diffusion = tiny.shape(backbone), DiffusionConfig(block_size=4)
    kernels = KernelConfig(attention=backend, masked_rows_only=gathered)
    network = tiny.build(model, diffusion, tiny.weights_of(model), kernels)
    loss, gradients = loss_and_gradients(network, without_noise(tiny.batch_of(model, diffusion, 2)))
    assert loss == 0
    for name, gradient in gradients.items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("gathered", [True, False])
def test_a_label_that_is_the_mask_spoils_nothing_where_it_has_no_weight(gathered):
    """A row may hold the mask's id as text: it is the label of a position that is not predicted."""
    model, diffusion = tiny.shape(), DiffusionConfig(block_size=4)
    network = tiny.build(model, diffusion, tiny.weights_of(model), KernelConfig(masked_rows_only=gathered))
    batch = tiny.batch_of(model, diffusion, 2)
    batch.labels[batch.weight == 0] = tiny.MASK
    loss, gradients = loss_and_gradients(network, batch)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_bf16_is_near_fp32(backbone, objective):
    model, diffusion = tiny.shape(backbone), OBJECTIVES[objective]
    batch = tiny.batch_of(model, diffusion, 4)
    rounded = {name: x.bfloat16() for name, x in tiny.weights_of(model).items()}
    loss, gradients = loss_and_gradients(tiny.build(model, diffusion, rounded, bf16=True), batch)
    exact, exact_gradients = loss_and_gradients(tiny.build(model, diffusion, rounded), batch)
    assert (loss.dtype, gradients["embedding.word_embeddings.weight"].dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)
    for name, gradient in gradients.items():
        cosine = torch.cosine_similarity(gradient.float().flatten(), exact_gradients[name].flatten(), 0)
        assert cosine > 0.98, name


def test_a_batch_counts_every_position_and_weighs_masked_ones_only():
    model, diffusion = tiny.shape(), DiffusionConfig(block_size=4, draws=2)
    batch = tiny.batch_of(model, diffusion, 3)
    noisy, clean = batch.input_ids[:6], batch.input_ids[6:]
    assert batch.tokens == 2 * 3 * 16
    assert torch.equal(batch.labels, clean.repeat(2, 1))
    assert torch.equal(batch.weight > 0, noisy == tiny.MASK)
    assert torch.equal(noisy[noisy != tiny.MASK], batch.labels[noisy != tiny.MASK])
    assert bool((noisy[:, 0] == tiny.BOS).all())
    assert bool((batch.weight[batch.weight > 0] >= 1).all())  # w = 1 / t


def test_a_causal_batch_shifts_the_labels_and_leaves_the_last_position_out():
    rows = tiny.rows_of(tiny.shape(), 3)
    batch = causal_batch(rows)
    assert np.array_equal(batch.labels[:, :-1], rows[:, 1:])
    assert batch.weight.sum() == batch.tokens == 3 * 15
    assert torch.count_nonzero(batch.weight[:, -1]) == 0


# ---- through the engine ----


def joined(batches: list[Batch]) -> Batch:
    """The micro-batches as one batch of K = 1 draw."""
    noisy, clean = zip(*(batch.input_ids.chunk(2) for batch in batches))
    labels, weights = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("labels", "weight"))
    return Batch(torch.cat([*noisy, *clean]), labels, weights, sum(batch.tokens for batch in batches))


@pytest.mark.parametrize("backbone", tiny.BACKBONES)
def test_micro_batches_accumulate_to_the_gradient_of_the_whole_batch(world, backbone):
    diffusion = DiffusionConfig(block_size=4)
    parts = [tiny.batch_of(tiny.shape(backbone), diffusion, 2, seed) for seed in range(3)]
    split, whole = (tiny.engine(world, tiny.shape(backbone), diffusion) for _ in range(2))
    result, expected = split.train_step(parts, 1e-3), whole.train_step([joined(parts)], 1e-3)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for name, weight in tiny.state(whole).items():
        if name.startswith("exp_avg/"):  # (1 - beta1) times the clipped gradient
            torch.testing.assert_close(tiny.state(split)[name], weight, rtol=1e-4, atol=1e-7, msg=name)


def test_the_step_is_adams_with_clipping_and_decay_of_matrices_only(world):
    options = {"clip_norm": 0.5, "weight_decay": 0.1, "adam_eps": 1e-8, "beta1": 0.9, "beta2": 0.98}
    diffusion, lr = DiffusionConfig(block_size=4), 1e-2
    made = tiny.engine(world, tiny.shape("dit"), diffusion, **options)
    before = {name: x.clone() for name, x in tiny.state(made).items()}
    batch = tiny.batch_of(tiny.shape("dit"), diffusion, 4)
    network = tiny.build(tiny.shape("dit"), diffusion, tiny.weights_of(tiny.shape("dit")))
    loss, gradients = loss_and_gradients(network, batch)
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt().item()
    result = made.train_step([batch], lr)
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    assert norm > 0.5
    after = tiny.state(made)
    for name, gradient in gradients.items():
        clipped = gradient * 0.5 / norm
        weight = before[f"weights/{name}"]
        decayed = weight * (1 - lr * 0.1) if weight.dim() == 2 else weight
        expected = decayed - lr * clipped / (clipped.abs() + 1e-8)  # the first step, bias corrections included
        # Where a gradient is all rounding error, so is its sign.
        sure = clipped.abs() > 1e-6
        torch.testing.assert_close(after[f"weights/{name}"][sure], expected[sure], rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(after[f"exp_avg/{name}"], 0.1 * clipped, rtol=1e-3, atol=1e-7, msg=name)
        decay = min(0.9999, 2 / 11)
        ema = torch.lerp(weight, after[f"weights/{name}"], 1 - decay)
        torch.testing.assert_close(after[f"ema/{name}"], ema, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_without_a_masked_row_leaves_the_weights(world, precision):
    diffusion = DiffusionConfig(block_size=4)
    made = tiny.engine(world, tiny.shape(), diffusion, precision=precision)
    before = {name: x.clone() for name, x in tiny.state(made).items()}
    empty = without_noise(tiny.batch_of(tiny.shape(), diffusion, 2))
    result = made.train_step([empty, empty], 1e-2)
    assert (result.loss, result.grad_norm) == (0, 0)
    for name, tensor in tiny.state(made).items():
        assert torch.equal(tensor, before[name]), name


def test_the_averaged_weights_are_used_and_given_back(world):
    diffusion = DiffusionConfig(block_size=4)
    made = tiny.engine(world, tiny.shape(), diffusion)
    batch = tiny.batch_of(tiny.shape(), diffusion, 2)
    for _ in range(3):
        made.train_step([batch], 1e-2)
    (raw,) = made.forward([batch])
    with made.averaged():
        (averaged,) = made.forward([batch])
    (again,) = made.forward([batch])
    with torch.no_grad():
        expected = tiny.build(tiny.shape(), diffusion, made.masters.ema)(batch)
    assert torch.equal(averaged, expected)
    assert torch.equal(raw, again)
    assert not torch.equal(raw, averaged)


def test_bf16_training_follows_fp32(world):
    diffusion = DiffusionConfig(block_size=4)
    batches = [tiny.batch_of(tiny.shape(), diffusion, 4, seed) for seed in range(6)]
    losses = {}
    for precision in ("fp32", "bf16"):
        made = tiny.engine(world, tiny.shape(), diffusion, precision=precision)
        losses[precision] = [made.train_step([batch], 1e-3).loss for batch in batches]
        assert all(x.dtype == torch.float32 for x in tiny.state(made).values())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]
