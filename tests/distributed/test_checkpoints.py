"""Checkpoints written under one layout and resumed under any other, in either engine."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bd3_megatron.config import DiffusionConfig, ModelConfig, ParallelConfig
from pretrain.bench.parity import LAYOUTS, Layout, Task
from pretrain.checkpoint.loaded_run import OpenRun
from pretrain.checkpoint.reader import find_checkpoint, open_weights, read_weights
from pretrain.config.schema import RunConfig
from pretrain.conversion.convert import run_roundtrip
from pretrain.distributed.spawn import run_world
from tests.distributed.selection import collected, with_long
from tests.distributed.workers import resume, resume_each

# Grouped heads, a vocabulary that no tensor-parallel size divides, and an embedding that two stages have.
MODEL = ModelConfig(layers=4, hidden=32, heads=4, kv_heads=2, length=16, vocab_size=61, mask_id=60, tie_embeddings=True)
TASK = Task(MODEL, DiffusionConfig(block_size=4))
HALF, END = 10, 20
ALONE = Layout(1, ParallelConfig())
EVERY = LAYOUTS | {"single": ALONE, "CP2+distopt": Layout(2, ParallelConfig(context=2, distributed_optimizer=True))}
# Layout of the first half -> layouts that go on from it.
HANDOVERS = {
    "TP2xPP2": ["DP2", "DP2+distopt", "CP2", "PP2-interleaved", "ZeRO2", "single"],
    "DP2+distopt": ["TP2+SP", "CP2+distopt", "single"],
    "ZeRO3": ["DP2+distopt", "TP2", "ZeRO1", "single"],
    "TP2+SPxZeRO2": ["ZeRO3", "PP2"],
}
CASES = [(source, name) for source, names in HANDOVERS.items() for name in names]
LONG = [
    ("TP2xPP2", "DP2"),
    ("DP2+distopt", "CP2+distopt"),
    ("ZeRO3", "TP2"),
    ("ZeRO3", "ZeRO1"),
    ("TP2+SPxZeRO2", "PP2"),
]
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def possible(*names: str) -> bool:
    return DEEPSPEED or not any(EVERY[name].zero.stage for name in names)


@dataclass(frozen=True)
class Continued:
    """Second half of a run: losses by rank, and the run's folder."""

    losses: list[list[float]]
    run: Path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Continued:
    """Both halves on TP2xPP2; the checkpoint between them is written while the second half is trained."""
    run = tmp_path_factory.mktemp("uninterrupted")
    by_rank = run_world(4, resume, run, EVERY["TP2xPP2"], TASK, END, HALF)
    return Continued([losses[HALF:] for losses in by_rank], run)


@pytest.fixture(scope="module")
def continued(request, uninterrupted, tmp_path_factory) -> dict[tuple[str, str], Continued]:
    """The second half under every other layout, by (layout of the first half, of the second)."""
    folder = tmp_path_factory.mktemp("continued")
    sources = {"TP2xPP2": uninterrupted.run}
    for size in (2, 4):
        firsts = [name for name in HANDOVERS if name not in sources and EVERY[name].size == size and possible(name)]
        sources |= {name: folder / name for name in firsts}
        run_world(size, resume_each, [(folder / name, EVERY[name], TASK, HALF) for name in firsts])
    found = {}
    cases = [case for case in CASES if case not in LONG or case in collected(request, "source", "name")]
    for size in (1, 2):
        runs = {}
        for source, name in cases:
            if EVERY[name].size == size and possible(source, name):
                copy, half = folder / f"{source} {name}", Path("checkpoints") / f"step-{HALF:08d}"
                shutil.copytree(sources[source] / half, copy / half)
                runs[source, name] = (copy, EVERY[name], TASK, END)
        by_rank = run_world(size, resume_each, list(runs.values()))
        for number, (key, (copy, *_)) in enumerate(runs.items()):
            found[key] = Continued([losses[number] for losses in by_rank], copy)
    return found


@pytest.mark.parametrize(("source", "name"), with_long(CASES, LONG))
def test_a_checkpoint_goes_on_under_another_layout(uninterrupted, continued, source, name):
    if not possible(source, name):
        pytest.skip("DeepSpeed is not installed")
    expected, found = uninterrupted.losses[0], continued[source, name]
    for losses in found.losses:
        assert losses == pytest.approx(expected, rel=1e-5)
    ours, theirs = (read_weights(find_checkpoint(c.run, END)) for c in (found, uninterrupted))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5)


def test_replicated_tensors_are_written_once_by_all_replicas(continued):
    """Each of two context-parallel replicas writes about half, and both no more than one process."""
    sizes = {}
    for name in ("CP2", "single"):
        path = find_checkpoint(continued["TP2xPP2", name].run, END).path
        sizes[name] = [file.stat().st_size for file in sorted(path.glob("rank-*.safetensors"))]
    assert len(sizes["CP2"]) == 2
    assert max(sizes["CP2"]) < 1.1 * min(sizes["CP2"])
    assert sum(sizes["CP2"]) == pytest.approx(sum(sizes["single"]), rel=0.01)


@pytest.mark.parametrize("name", ["bd3", "sdar"])
@pytest.mark.parametrize(
    ("source", "step"), [("TP2xPP2", END), ("ZeRO3", HALF), ("single", END)], ids=["TP2xPP2", "ZeRO3", "single"]
)
def test_a_checkpoint_of_any_layout_is_exported_and_comes_back_bitwise(
    uninterrupted, continued, tmp_path, source, step, name
):
    if not possible(source):
        pytest.skip("DeepSpeed is not installed")
    runs = {"TP2xPP2": uninterrupted.run, "single": continued["TP2xPP2", "single"].run}
    run = runs.get(source) or continued["ZeRO3", "single"].run
    found = find_checkpoint(run, step)
    opened = OpenRun(run, RunConfig(model=MODEL, diffusion=TASK.diffusion), found, open_weights(found))
    assert run_roundtrip(opened, tmp_path, name)[1].largest == 0
