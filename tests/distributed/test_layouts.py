"""Every layout computes what one process computes: losses, gradients, updates, evaluation."""

from __future__ import annotations

import pytest
import torch

from bd3_megatron.config import DiffusionConfig, ModelConfig, ParallelConfig
from tests.distributed.spawn import run_world
from tests.distributed.workers import Outcome, train

# A vocabulary that no tensor-parallel size divides, grouped heads, an MLP with and without gating.
MODELS = {
    "qwen3": ModelConfig(layers=4, hidden=32, heads=4, kv_heads=2, length=16, vocab_size=61, mask_id=60),
    "tied": ModelConfig(layers=4, hidden=32, heads=4, length=16, vocab_size=61, mask_id=60, tie_embeddings=True),
    "dit": ModelConfig(backbone="dit", layers=4, hidden=32, heads=4, length=16, vocab_size=61, mask_id=60),
}
DIFFUSION = DiffusionConfig(block_size=4)
LAYOUTS = {
    2: {
        "TP2": ParallelConfig(tensor=2),
        "PP2": ParallelConfig(pipeline=2),
        "TP2+SP": ParallelConfig(tensor=2, sequence=True),
        "DP2": ParallelConfig(),
        "DP2+distopt": ParallelConfig(distributed_optimizer=True),
        "CP2": ParallelConfig(context=2),
        "PP2 interleaved": ParallelConfig(pipeline=2, interleave=2),
    },
    4: {
        "TP2xPP2": ParallelConfig(tensor=2, pipeline=2),
        "TP2+SPxDP2": ParallelConfig(tensor=2, sequence=True),
        "PP4": ParallelConfig(pipeline=4),
        "PP2xDP2": ParallelConfig(pipeline=2),
    },
}
CASES = [(size, layout, model) for size, layouts in LAYOUTS.items() for layout in layouts for model in MODELS]


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], list[Outcome]]:
    """Outcome on every rank by (layout, model); each world's processes start once."""
    single = ParallelConfig()
    found = {("single", m): [o] for m, o in zip(MODELS, run_world(1, train, _runs({"single": single}))[0])}
    for size, layouts in LAYOUTS.items():
        by_rank = run_world(size, train, _runs(layouts))
        keys = [(layout, model) for layout in layouts for model in MODELS]
        found |= {key: [rank[i] for rank in by_rank] for i, key in enumerate(keys)}
    return found


def _runs(layouts: dict[str, ParallelConfig]) -> list:
    return [
        (f"{name}-{m}", model, DIFFUSION, layout) for name, layout in layouts.items() for m, model in MODELS.items()
    ]


@pytest.mark.parametrize(("size", "layout", "model"), CASES)
def test_a_layout_equals_one_process(outcomes, size, layout, model):
    expected = outcomes["single", model][0]
    for outcome in outcomes[layout, model]:
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
        assert outcome.norms == pytest.approx(expected.norms, rel=1e-5)
        for found, wanted, tolerance in (
            (outcome.gradients, expected.gradients, 1e-5),
            (outcome.state, expected.state, 1e-4),
        ):
            assert found.keys() == wanted.keys()
            for name, tensor in wanted.items():
                difference = (found[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-12)
                assert difference < tolerance, name


@pytest.mark.parametrize(("size", "layout", "model"), CASES)
def test_evaluation_is_the_same_under_every_layout(outcomes, size, layout, model):
    expected = outcomes["single", model][0].nll
    by_rank = [outcome.nll for outcome in outcomes[layout, model]]
    parts = {tuple(part.flatten().tolist()): part for part in by_rank}
    # Ranks of one data-parallel group agree; the groups together hold the whole batch in order.
    found = torch.cat(list(parts.values()))
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
