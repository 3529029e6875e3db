"""The search for a clip interval finds the same under every layout."""

import numpy as np
import pytest

from bd3_megatron.config import DiffusionConfig, ModelConfig, ParallelConfig
from data_prep.format.manifest import load_manifest
from pretrain.bench.parity import LAYOUTS, Layout, Task
from pretrain.config.schema import ClipSearchConfig
from pretrain.distributed.spawn import run_world
from tests.distributed.workers import search_each


@pytest.mark.parametrize("estimator", ["counts", "direct"])
def test_every_layout_finds_the_same_variances(data_set, estimator):
    manifest = load_manifest(data_set)
    ids = {"vocab_size": manifest.vocab_size, "mask_id": manifest.mask_id}
    model = ModelConfig(layers=2, hidden=32, heads=4, kv_heads=2, length=manifest.length, **ids)
    task = Task(model, DiffusionConfig(block_size=4, beta=0.3, omega=0.8, resample=True), micro_batch=5)
    options = ClipSearchConfig(rows=17, estimator=estimator, grid=((0.001, 1.0), (0.5, 1.0), (0.45, 0.95)))
    layouts = [LAYOUTS[name] for name in ("DP2", "TP2", "PP2", "CP2")]
    ((alone,),) = run_world(1, search_each, data_set, [Layout(1, ParallelConfig())], task, options)
    for by_layout in run_world(2, search_each, data_set, layouts, task, options):
        for found in by_layout:
            assert (found.interval, found.best) == (alone.interval, alone.best)
            for name in ("means", "variances", "differences", "errors"):
                np.testing.assert_allclose(getattr(found, name), getattr(alone, name), rtol=1e-4, atol=1e-6)
