"""A checkpoint written under one layout goes on under any other."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bd3_megatron.config import DiffusionConfig, ModelConfig, ParallelConfig
from pretrain import checkpoint
from tests.distributed.spawn import run_world
from tests.distributed.workers import resume, resume_each

# Grouped heads, a vocabulary that no tensor-parallel size divides, and an embedding that two stages hold.
MODEL = ModelConfig(layers=4, hidden=32, heads=4, kv_heads=2, length=16, vocab_size=61, mask_id=60, tie_embeddings=True)
DIFFUSION = DiffusionConfig(block_size=4)
HALF, END = 10, 20
SHARDED = ParallelConfig(distributed_optimizer=True)
# Ranks and layout that go on: from the checkpoint of TP2xPP2, and from that of the distributed optimizer.
FROM_PIPELINE = {
    "DP2+distopt": (2, SHARDED),
    "CP2": (2, ParallelConfig(context=2)),
    "PP2 interleaved": (2, ParallelConfig(pipeline=2, interleave=2)),
    "single": (1, ParallelConfig()),
}
FROM_SHARDED = {
    "TP2+SP": (2, ParallelConfig(tensor=2, sequence=True)),
    "CP2+distopt": (2, ParallelConfig(context=2, distributed_optimizer=True)),
    "single": (1, ParallelConfig()),
}
CASES = [("TP2xPP2", name) for name in FROM_PIPELINE] + [("DP2+distopt", name) for name in FROM_SHARDED]


@dataclass(frozen=True)
class Continued:
    """Of the second half: losses by rank, and the run's folder."""

    losses: list[list[float]]
    run: Path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Continued:
    """Both halves on TP2xPP2; the checkpoint between them is written while the second half is trained."""
    run = tmp_path_factory.mktemp("uninterrupted")
    layout = ParallelConfig(tensor=2, pipeline=2)
    by_rank = run_world(4, resume, run, MODEL, DIFFUSION, layout, END, HALF)
    return Continued([losses[HALF:] for losses in by_rank], run)


@pytest.fixture(scope="module")
def continued(uninterrupted, tmp_path_factory) -> dict[tuple[str, str], Continued]:
    """The second half under every other layout, by (layout of the first half, of the second)."""
    folder, found = tmp_path_factory.mktemp("continued"), {}
    sharded = folder / "sharded"
    first = run_world(2, resume, sharded, MODEL, DIFFUSION, SHARDED, HALF)
    assert len(first[0]) == HALF
    sources = {
        "TP2xPP2": (uninterrupted.run, FROM_PIPELINE),
        "DP2+distopt": (sharded, FROM_SHARDED),
    }
    for size in (1, 2):
        runs = {}
        for source, (run, layouts) in sources.items():
            for name, (ranks, layout) in layouts.items():
                if ranks == size:
                    copy = folder / f"{source} {name}"
                    half = Path("checkpoints") / f"step-{HALF:08d}"
                    shutil.copytree(run / half, copy / half)
                    runs[source, name] = (copy, MODEL, DIFFUSION, layout, END)
        by_rank = run_world(size, resume_each, list(runs.values()))
        for number, (key, (copy, *_)) in enumerate(runs.items()):
            found[key] = Continued([losses[number] for losses in by_rank], copy)
    return found


@pytest.mark.parametrize(("source", "name"), CASES)
def test_a_checkpoint_goes_on_under_another_layout(uninterrupted, continued, source, name):
    expected, found = uninterrupted.losses[0], continued[source, name]
    for losses in found.losses:
        assert losses == pytest.approx(expected, rel=1e-5)
    ours, theirs = (checkpoint.read_weights(checkpoint.find(c.run, END)) for c in (found, uninterrupted))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5)


def test_what_ranks_hold_alike_is_written_once_and_by_all_of_them(continued):
    """Each of two context-parallel replicas writes about half, and together no more than one process."""
    sizes = {}
    for name in ("CP2", "single"):
        path = checkpoint.find(continued["TP2xPP2", name].run, END).path
        sizes[name] = [file.stat().st_size for file in sorted(path.glob("__*"))]
    assert len(sizes["CP2"]) == 2
    assert max(sizes["CP2"]) < 1.1 * min(sizes["CP2"])
    assert sum(sizes["CP2"]) == pytest.approx(sum(sizes["single"]), rel=0.01)
