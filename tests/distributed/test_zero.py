"""ZeRO computes what one Megatron process computes; what it cannot do is refused."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from bd3_common.errors import ConfigError
from bd3_megatron.config import DiffusionConfig, ModelConfig, ParallelConfig, ZeroConfig
from bd3_megatron.engine import ops
from pretrain import cli
from pretrain.bench import parity
from pretrain.bench.parity import LAYOUTS, Layout, Outcome, Task
from pretrain.tracking.metrics import read_metrics
from tests.distributed.launch import Job
from tests.distributed.selection import collected
from tests.unit.commands import bd3

installed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
BUILT = importlib.util.find_spec("deepspeed") is not None and ops.built()

SIZES = {"layers": 2, "hidden": 32, "heads": 4, "length": 16, "vocab_size": 61, "mask_id": 60}
BLOCKS = DiffusionConfig(block_size=4)
QWEN3 = Task(ModelConfig(kv_heads=2, **SIZES), BLOCKS, steps=4)
# Without tensor parallelism every matrix is above the 100,000 elements up to which stage 3 keeps parameters whole on
# every rank. Head and last layer read weights outside of the modules that own them.
WIDE = ModelConfig(layers=2, hidden=320, heads=4, length=16, vocab_size=401, mask_id=400)
TASKS = {
    "qwen3": QWEN3,
    "wide": Task(WIDE, BLOCKS, steps=2),
    "wide tied": Task(WIDE.model_copy(update={"tie_embeddings": True}), BLOCKS, steps=2),
    "tied": Task(ModelConfig(tie_embeddings=True, **SIZES), BLOCKS, steps=2),
    "dit": Task(ModelConfig(backbone="dit", **SIZES), BLOCKS, steps=2),
    "documents": QWEN3._replace(documents=True),
    "bf16": QWEN3._replace(precision="bf16"),
}
RECIPE = """
model: {layers: 1, hidden: 32, heads: 4, length: 32}
diffusion: {block_size: 4}
train: {steps: 2, global_batch: 4, micro_batch: 2, precision: fp32, warmup_steps: 0, adam_eps: 1.0e-4}
eval: {every: 2, rows: 17, micro_batch: 8}
log: {tensorboard: false}
"""
ZERO = {name: layout for name, layout in LAYOUTS.items() if layout.zero.stage}
MORE = ZERO | {
    "DP1-ZeRO2": Layout(1, ParallelConfig(), ZeroConfig(stage=2)),
    "PP2-ZeRO1": Layout(2, ParallelConfig(pipeline=2), ZeroConfig(stage=1)),
    "ZeRO3-full": Layout(2, ParallelConfig(recompute="full"), ZeroConfig(stage=3)),
    "ZeRO2-offload": Layout(2, ParallelConfig(), ZeroConfig(stage=2, offload=True)),
    "ZeRO3-offload": Layout(2, ParallelConfig(), ZeroConfig(stage=3, offload=True)),
}
CASES = [
    *(("qwen3", name) for name in MORE),
    ("documents", "ZeRO1"),
    ("tied", "ZeRO3"),
    ("wide", "ZeRO3"),
    ("wide", "ZeRO3-full"),
    ("wide", "TP2xZeRO3"),
    ("wide tied", "ZeRO3"),
    ("dit", "ZeRO3-full"),
    ("dit", "PP2-ZeRO1"),
    ("dit", "TP2+SPxZeRO2"),
]
LONG = [
    ("qwen3", "TP2xZeRO1"),
    ("qwen3", "PP2xZeRO1"),
    ("tied", "ZeRO3"),
    ("wide", "ZeRO3-full"),
    ("wide", "TP2xZeRO3"),
    ("dit", "PP2-ZeRO1"),
    ("dit", "TP2+SPxZeRO2"),
]
BF16 = ["ZeRO1", "ZeRO2", "ZeRO3", "ZeRO2-offload"]


@pytest.fixture(scope="module")
def outcomes(request) -> dict[tuple[str, str], list[Outcome]]:
    """Outcome on every rank by (task, layout); layout "" is one process of the Megatron engine."""
    cases = sorted(collected(request, "task", "layout") | {("bf16", name) for name in BF16})
    cases = [case for case in cases if BUILT or not MORE[case[1]].zero.offload]
    runs = {f"{task}:{name}": (MORE[name], TASKS[task]) for task, name in cases}
    runs |= {f"{task}:": (Layout(1, ParallelConfig()), TASKS[task]) for task in TASKS}
    return {tuple(name.split(":")): found for name, found in parity.run(runs).items()}


def needs(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif("offload" in names[-1] and not BUILT, reason=f"not built; run {ops.COMMAND}")


@installed
@pytest.mark.parametrize(
    ("task", "layout"),
    [pytest.param(*case, marks=[needs(*case), *([pytest.mark.long] if case in LONG else [])]) for case in CASES],
)
def test_zero_equals_one_process(outcomes, task, layout):
    found = parity.compare(outcomes[task, layout], outcomes[task, ""][0])
    assert found.passes, found


@installed
@pytest.mark.parametrize("layout", [pytest.param(name, marks=needs(name)) for name in BF16])
def test_bf16_follows_the_megatron_engine(outcomes, layout):
    (expected,) = outcomes["bf16", ""]
    for outcome in outcomes["bf16", layout]:
        assert outcome.losses == pytest.approx(expected.losses, rel=0.003)
        assert outcome.norms == pytest.approx(expected.norms, rel=0.01)
        assert all(tensor.dtype == torch.float32 for tensor in outcome.state.values())


@installed
def test_every_step_was_clipped(outcomes):
    assert all(min(outcomes[task, ""][0].norms) > parity.CLIP_NORM for task in TASKS)


@installed
def test_ranks_that_gather_weights_evaluate_rows_that_do_not_divide(data_set, tmp_path):
    """17 rows by 8: of two ranks one has a row less, and would leave the other waiting for its weights."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    args = ("pretrain", "--config", recipe, "--data.path", data_set)
    assert bd3(*args, "--run", tmp_path / "alone", log=tmp_path / "log").code == 0
    for done in Job([*args, "--run", tmp_path / "zero", "--zero.stage", 3], 2, tmp_path).finish():
        assert done.code == 0, done.err
    alone, zero = (read_metrics(tmp_path / run) for run in ("alone", "zero"))
    assert [record["split"] for record in zero] == ["validation", "train", "train", "validation"]
    for ours, expected in zip(zero, alone, strict=True):
        numbers = {name: value for name, value in expected.items() if name != "split"}
        assert {name: ours[name] for name in numbers} == pytest.approx(numbers, rel=1e-5)


def _nothing_built(folder: str) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    cli.RANK_0_PRINTS = 0.1


@installed
def test_what_offloading_lacks_is_told_once_and_before_anything_is_written(data_set, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    args = ["pretrain", "--config", recipe, "--data.path", data_set, "--run", tmp_path / "run", "--zero.stage", 2]
    empty = {0: functools.partial(_nothing_built, str(tmp_path)), 1: functools.partial(_nothing_built, str(tmp_path))}
    first, second = Job([*args, "--zero.offload"], 2, tmp_path, before=empty).finish()
    assert (first.code, second.code, second.err) == (2, 2, "")
    assert len(first.err.splitlines()) == 1
    assert first.err.startswith("zero.offload=true: DeepSpeed's cpu_adam is not built for this machine; run ")
    assert not (tmp_path / "run").exists()


def test_a_missing_deepspeed_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"^zero\.stage=2: DeepSpeed is not installed; pip install .*$"):
        ops.import_deepspeed("zero.stage=2")


@installed
def test_offloading_does_not_build_while_training(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=rf"^zero\.offload=true: .* is not built .*; run {ops.COMMAND}$"):
        ops.load()


@installed
def test_building_without_a_compiler_fails_in_one_line(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"^no-such-compiler: not found; install a C\+\+ compiler"):
        ops.build()


@installed
def test_the_lock_of_a_killed_build_is_removed(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)  # anything that exists
    lock = tmp_path / ops.OP / "lock"
    lock.parent.mkdir()
    lock.touch()
    ops.import_deepspeed("zero.offload=true")
    from deepspeed.ops.op_builder import CPUAdamBuilder

    locked = []
    monkeypatch.setattr(CPUAdamBuilder, "jit_load", lambda *_, **__: locked.append(lock.exists()))
    assert not ops.built()
    ops.build()
    assert ops.built()
    ops.build()
    assert locked == [False]  # built once, without waiting for the lock
