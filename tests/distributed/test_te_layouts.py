"""Transformer Engine layers and the state of FP8 under layouts, on stand-ins: names, shards, sums and checkpoints."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from bd3_megatron.config import DiffusionConfig, Fp8Config, KernelConfig, ModelConfig
from pretrain.bench import parity
from pretrain.bench.parity import LAYOUTS, Layout, Task
from pretrain.checkpoint.reader import find_checkpoint, read_tensors
from pretrain.checkpoint.stored import StoredTensors
from pretrain.distributed.spawn import run_world
from tests.distributed.workers import resume_with_te, train_with_te

SIZES = {"layers": 2, "hidden": 32, "heads": 4, "length": 32, "vocab_size": 61, "mask_id": 60}
BLOCKS = DiffusionConfig(block_size=4)
LOCAL = {
    "qwen3": Task(ModelConfig(kv_heads=2, **SIZES), BLOCKS, steps=2, kernels=KernelConfig(layers="local")),
    "dit": Task(ModelConfig(backbone="dit", **SIZES), BLOCKS, steps=2, kernels=KernelConfig(layers="local")),
}
TE = {name: task._replace(kernels=KernelConfig(layers="te")) for name, task in LOCAL.items()}
DELAYED = TE["qwen3"]._replace(steps=4, fp8=Fp8Config(enabled=True, recipe="delayed", amax_history=4))
ALONE = Layout(1, LAYOUTS["DP2"].parallel)
NAMES = ["TP2", "TP2+SP", "PP2", "CP2", "DP2+distopt"]
NAMES += ["ZeRO2"] if importlib.util.find_spec("deepspeed") else []


@pytest.fixture(scope="module")
def outcomes():
    """Outcome on every rank by (task, layout); one process has the local layers."""
    runs = {f"{task}:{name}": (LAYOUTS[name], TE[task]) for task in TE for name in NAMES}
    runs |= {f"{task}:": (ALONE, LOCAL[task]) for task in LOCAL}
    return parity.run(runs, train_with_te)


@pytest.mark.parametrize("task", TE)
@pytest.mark.parametrize("name", NAMES)
def test_a_layout_equals_one_process_with_local_layers(outcomes, task, name):
    found = parity.compare(outcomes[f"{task}:{name}"], outcomes[f"{task}:"][0])
    assert found.passes, found


def scales(run: Path) -> dict[str, torch.Tensor]:
    """The section of FP8 in a run's newest checkpoint."""
    return read_tensors(StoredTensors(find_checkpoint(run)), "fp8/")


def test_delayed_scaling_goes_on_under_every_layout(tmp_path):
    layouts = {name: LAYOUTS[name] for name in ("TP2+SP", "PP2", "DP2")}
    straight = run_world(
        1, resume_with_te, [(tmp_path / "alone", ALONE, DELAYED, 2), (tmp_path / "all", ALONE, DELAYED, 4)]
    )
    first = run_world(2, resume_with_te, [(tmp_path / name, layout, DELAYED, 2) for name, layout in layouts.items()])
    expected = scales(tmp_path / "alone")
    assert len(expected) == 2 * 4 * 4
    for name in layouts:
        found = scales(tmp_path / name)
        assert set(found) == set(expected)
        if name == "DP2":  # a history counts forward passes, and here each rank makes half as many
            continue
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0.02, atol=1e-6, msg=f"{name} {key}")
    # Onwards: each under itself exactly as in one go, and by one process.
    again = run_world(2, resume_with_te, [(tmp_path / name, layout, DELAYED, 4) for name, layout in layouts.items()])
    whole = run_world(
        2, resume_with_te, [(tmp_path / f"{name} whole", layout, DELAYED, 4) for name, layout in layouts.items()]
    )
    for rank in range(2):
        for n, name in enumerate(layouts):
            assert first[rank][n] + again[rank][n] == whole[rank][n], name
            assert whole[rank][n] == pytest.approx(straight[0][1], rel=1.5e-2)  # FP8 keeps three bits
