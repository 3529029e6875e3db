"""Statistics over blocks, and gradients without an update, are the same under every layout."""

from __future__ import annotations

import pytest

from bd3_megatron.config import DiffusionConfig, ModelConfig, ParallelConfig
from pretrain.bench.parity import LAYOUTS, Layout, Task
from pretrain.distributed.spawn import run_world
from tests.distributed.workers import measure_each

MODEL = ModelConfig(layers=4, hidden=32, heads=4, kv_heads=2, length=32, vocab_size=61, mask_id=60)
TWO = ("DP2", "TP2", "TP2+SP", "PP2", "PP2-interleaved", "CP2", "DP2+distopt", "ZeRO1", "ZeRO2")


@pytest.mark.parametrize("masking", ["levels", "counts"])
def test_every_layout_measures_the_same(masking):
    task = Task(MODEL, DiffusionConfig(block_size=4, masking=masking, draws=2))
    names = list(TWO)
    (((expected, norm),),) = run_world(1, measure_each, [Layout(1, ParallelConfig())], task)
    assert expected["block_variance"] > 0
    assert norm is not None
    for by_layout in run_world(2, measure_each, [LAYOUTS[name] for name in names], task):
        for name, (found, other) in zip(names, by_layout):
            assert found == pytest.approx(expected, rel=1e-4), name
            # DeepSpeed computes norms in its step alone.
            assert other is None if LAYOUTS[name].zero.stage else other == pytest.approx(norm, rel=1e-4), name
