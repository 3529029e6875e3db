"""The search for a clip interval finds the same under every layout, and of a planted model the true optimum."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bd3_megatron.config import DiffusionConfig, ModelConfig, ParallelConfig
from bd3_megatron.diffusion.clips import count_law, default_grid
from data_prep.format.manifest import load_manifest
from pretrain.bench.parity import LAYOUTS, Layout, Task
from pretrain.config.schema import ClipSearchConfig
from pretrain.distributed.spawn import run_world
from tests.distributed.workers import search_each

ALONE = Layout(1, ParallelConfig())


@pytest.fixture(scope="module")
def model(data_set) -> ModelConfig:
    manifest = load_manifest(data_set)
    ids = {"vocab_size": manifest.vocab_size, "mask_id": manifest.mask_id}
    return ModelConfig(layers=2, hidden=32, heads=4, kv_heads=2, length=manifest.length, **ids)


@pytest.mark.parametrize("estimator", ["counts", "direct"])
def test_every_layout_finds_the_same_variances(data_set, model, estimator):
    task = Task(model, DiffusionConfig(block_size=4, beta=0.3, omega=0.8, resample=True), micro_batch=5)
    options = ClipSearchConfig(rows=17, estimator=estimator, grid=((0.001, 1.0), (0.5, 1.0), (0.45, 0.95)))
    layouts = [LAYOUTS[name] for name in ("DP2", "TP2", "PP2", "CP2")]
    ((alone,),) = run_world(1, search_each, data_set, [ALONE], task, options)
    for by_layout in run_world(2, search_each, data_set, layouts, task, options):
        for found in by_layout:
            assert (found.interval, found.best) == (alone.interval, alone.best)
            for name in ("means", "variances", "differences", "errors"):
                np.testing.assert_allclose(getattr(found, name), getattr(alone, name), rtol=1e-4, atol=1e-6)


def planted_variance(law, size: int, blocks: int, nll: float) -> float:
    """Variance of the block loss of a model that gives every token but the mask the same probability.

    The nll of a block with k masked tokens is k times that of one; in the first block of a row BOS, which is among
    k of B' with the probability k / B', has none.
    """
    k, first = np.arange(size + 1), 1 / blocks
    m1 = nll * k * (1 - first / size)
    m2 = nll**2 * ((1 - first) * k**2 + first * (k**2 - (2 * k - 1) * k / size))
    return law.second @ m2 / size**2 - (law.first @ m1 / size) ** 2


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("resample", [False, True])
def test_of_a_planted_model_the_true_optimum_is_found(data_set, model, size, resample):
    diffusion = DiffusionConfig(block_size=size, resample=resample)
    task, options = Task(model, diffusion, micro_batch=16), ClipSearchConfig(rows=256)
    grid = default_grid(size)
    laws = [count_law(diffusion.model_copy(update={"beta": low, "omega": high})) for low, high in grid]
    nll = math.log(model.vocab_size - 1)  # the mask is never predicted
    exact = np.array([planted_variance(law, size, model.length // size, nll) for law in laws])
    runs = [(1, [ALONE]), (2, [LAYOUTS["TP2"], LAYOUTS["DP2"]])]
    found = [
        one
        for ranks, layouts in runs
        for of_rank in run_world(ranks, search_each, data_set, layouts, task, options, True)
        for one in of_rank
    ]
    assert len(found) == 5
    for one in found:
        np.testing.assert_allclose(one.variances, exact, rtol=0.05)
        assert one.interval == grid[int(np.argmin(exact))]
