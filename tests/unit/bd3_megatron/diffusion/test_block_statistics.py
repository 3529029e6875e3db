"""Statistics of a training step over its blocks, against the nll of every token by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bd3_megatron.config import PLAIN, DiffusionConfig, KernelConfig
from bd3_megatron.diffusion.block_statistics import BlockStatistics, count_groups, group_names
from tests.unit import tiny

OBJECTIVES = {
    "levels": DiffusionConfig(block_size=4),
    "counts": DiffusionConfig(block_size=4, masking="counts"),
    "draws": DiffusionConfig(block_size=4, masking="counts", draws=2, coupling="complementary"),
    "mdlm": DiffusionConfig(block_size=16, masking="counts"),
}


def by_hand(engine, batches, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, number of masked tokens and summed nll of every block."""
    found = []
    for batch, weighted in zip(batches, engine.forward(batches)):
        blocks = weighted.double().numpy().reshape(-1, size)
        weight = batch.weight.double().numpy().reshape(-1, size)
        nll = np.divide(blocks, weight, out=np.zeros_like(blocks), where=weight > 0)
        found.append((blocks.mean(1), (weight > 0).sum(1), nll.sum(1)))
    return tuple(np.concatenate(column) for column in zip(*found))


@pytest.mark.parametrize("kernels", [KernelConfig(), PLAIN], ids=["savings", "plain"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sums_are_those_of_every_token_by_itself(world, objective, kernels):
    diffusion, model = OBJECTIVES[objective], tiny.shape()
    made = tiny.engine(world, model, diffusion)
    made.module.kernels = kernels
    batches = [tiny.batch_of(model, diffusion, 6, seed) for seed in (0, 1)]
    loss, counts, nll = by_hand(made, batches, diffusion.block_size)
    plain = tiny.engine(world, model, diffusion)
    plain.module.kernels = kernels
    expected, result = plain.train_step(batches, 0.0), made.train_step(batches, 0.0, statistics=True)
    assert (result.loss, result.grad_norm) == (expected.loss, expected.grad_norm)
    assert not expected.blocks
    found = result.blocks
    assert found["block_variance"] == pytest.approx(loss.var(), rel=1e-4)
    assert found["masked_fraction"] == pytest.approx(counts.sum() / (len(counts) * diffusion.block_size))
    by_count = {k: nll[counts == k].sum() / (counts == k).sum() / k for k in set(counts.tolist()) - {0}}
    for k in range(1, diffusion.block_size + 1):
        value = found[f"nll_by_count_{k}"]
        assert (value is None) == (k not in by_count)
        assert value is None or value == pytest.approx(by_count[k], rel=1e-4)
    missing = len(by_count) < diffusion.block_size
    assert (found["bound"] is None) == missing
    if not missing:
        assert found["bound"] == pytest.approx(np.mean(list(by_count.values())), rel=1e-4)


def test_the_causal_objective_has_no_blocks(world):
    model, diffusion = tiny.shape(), DiffusionConfig(objective="causal", block_size=1)
    made = tiny.engine(world, model, diffusion)
    assert made.train_step([tiny.batch_of(model, diffusion, 2)], 1e-3, statistics=True).blocks == {}


def test_large_blocks_have_sixteen_groups_of_counts():
    assert count_groups(4) == [1, 2, 3, 4]
    assert group_names(count_groups(4)) == ["1", "2", "3", "4"]
    edges = count_groups(1000)
    assert (len(edges), edges[-1]) == (16, 1000)
    assert group_names(edges)[0] == f"1-{edges[0]}"


def test_the_bound_weighs_groups_by_their_counts():
    sums = torch.zeros(4 + 32, dtype=torch.float64)
    sums[0] = 1
    edges = np.array(count_groups(40))
    widths = np.diff(edges, prepend=0)
    sums[4:20], sums[20:] = torch.from_numpy(np.arange(16.0) * 10), 10
    assert BlockStatistics.fields(40, sums)["bound"] == pytest.approx((np.arange(16) * widths).sum() / 40)


# ---- gradients without an update ----


def test_a_gradient_without_an_update_changes_nothing(world):
    model, diffusion = tiny.shape(), DiffusionConfig(block_size=4)
    first, second = tiny.engine(world, model, diffusion), tiny.engine(world, model, diffusion)
    batches = [tiny.batch_of(model, diffusion, 4, seed) for seed in (0, 1)]
    norm = first.gradient_norm(batches)
    assert norm == pytest.approx(second.train_step(batches, 1e-3).grad_norm, rel=1e-6)
    first.train_step(batches, 1e-3)
    for name, x in tiny.state(first).items():
        assert torch.equal(x, tiny.state(second)[name]), name


@pytest.mark.parametrize("draws", [1, 2])
def test_parts_of_a_batch_have_its_rows(world, draws):
    model, diffusion = tiny.shape(), DiffusionConfig(block_size=4, draws=draws)
    made = tiny.engine(world, model, diffusion)
    batch = tiny.batch_of(model, diffusion, 6, documents=tiny.documents_of(model, 6))
    (whole,) = made.forward([batch])
    parts = [batch.part(draws, rows) for rows in (slice(0, 2), slice(2, 6))]
    found = [made.forward([part])[0].view(draws, -1, model.length) for part in parts]
    assert torch.allclose(torch.cat(found, 1).flatten(0, 1), whole, rtol=1e-5, atol=1e-6)
    assert sum(part.tokens for part in parts) == batch.tokens
