"""Evaluation by document where ranks share the rows: what one process finds."""

from __future__ import annotations

import pytest

from bd3_megatron.config import DiffusionConfig, ModelConfig, ParallelConfig
from data_prep.format.manifest import load_manifest
from pretrain.bench.parity import LAYOUTS, Layout, Task
from pretrain.distributed.spawn import run_world
from tests.distributed.workers import evaluate_each


def test_documents_are_joined_from_the_rows_of_all_ranks(data_set):
    manifest = load_manifest(data_set)
    # All but a few: an odd number, so that of two ranks one has a row that stands in for another.
    rows = (manifest.splits["validation"].rows - 2) // 2 * 2 - 1
    ids = {"vocab_size": manifest.vocab_size, "mask_id": manifest.mask_id}
    model = ModelConfig(layers=2, hidden=32, heads=4, kv_heads=2, length=manifest.length, **ids)
    task = Task(model, DiffusionConfig(block_size=4), micro_batch=5)
    layouts = [LAYOUTS[name] for name in ("DP2", "PP2", "CP2")]
    (((alone, expected),),) = run_world(1, evaluate_each, data_set, [Layout(1, ParallelConfig())], task, rows)
    assert len(expected.numbers) > 1
    assert expected.cut == 1  # the last one
    for by_layout in run_world(2, evaluate_each, data_set, layouts, task, rows):
        for result, found in by_layout:
            assert result.nelbo == pytest.approx(alone.nelbo, rel=1e-5)
            assert (result.rows, result.tokens) == (rows, alone.tokens)
            assert found.cut == expected.cut
            assert found.numbers.tolist() == expected.numbers.tolist()
            assert found.tokens.tolist() == expected.tokens.tolist()
            assert found.nats == pytest.approx(expected.nats, rel=1e-5)
