"""A checkpoint goes on under another layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bd3_megatron.config import DiffusionConfig, ModelConfig, ParallelConfig
from pretrain import checkpoint
from tests.distributed.spawn import run_world
from tests.distributed.workers import resume

MODELS = {"qwen3": ModelConfig(layers=4, hidden=32, heads=4, kv_heads=2, length=16, vocab_size=61, mask_id=60)}
DIFFUSION = DiffusionConfig(block_size=4)
LAYOUTS = {
    2: {"TP2+SP": ParallelConfig(tensor=2, sequence=True), "DP2": ParallelConfig()},
    4: {"TP2xPP2": ParallelConfig(tensor=2, pipeline=2)},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, list[float]]:
    """Folder and losses of four steps in one process."""
    run = tmp_path_factory.mktemp("uninterrupted")
    return run, run_world(1, resume, run, MODELS["qwen3"], DIFFUSION, ParallelConfig(), 4)[0]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((4, LAYOUTS[4]["TP2xPP2"]), (1, ParallelConfig())),
        ((4, LAYOUTS[4]["TP2xPP2"]), (2, LAYOUTS[2]["DP2"])),
        ((1, ParallelConfig()), (2, LAYOUTS[2]["TP2+SP"])),
    ],
    ids=["TP2xPP2-to-single", "TP2xPP2-to-DP2", "single-to-TP2+SP"],
)
def test_a_checkpoint_goes_on_under_another_layout(tmp_path, uninterrupted, first, then):
    (size, layout), (other_size, other_layout) = first, then
    run_world(size, resume, tmp_path, MODELS["qwen3"], DIFFUSION, layout, 2)
    # Two steps after the restart: a wrong optimizer state shows at the second.
    by_rank = run_world(other_size, resume, tmp_path, MODELS["qwen3"], DIFFUSION, other_layout, 4)
    whole_run, losses = uninterrupted
    for found in by_rank:
        assert found == pytest.approx(losses[2:], rel=1e-5)
    ours, expected = (checkpoint.read_weights(checkpoint.find(run)) for run in (tmp_path, whole_run))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)
