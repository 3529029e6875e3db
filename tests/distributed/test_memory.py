"""Memory of ranks as `bd3 estimate` counts it, compared with that of real ranks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from bd3_megatron import parallel
from bd3_megatron.config import (
    DiffusionConfig,
    EngineConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
    Section,
    ZeroConfig,
)
from bd3_megatron.cost.memory import state_bytes
from bd3_megatron.cost.partition import parameter_shapes, stage_chunks
from bd3_megatron.engine import build_engine
from bd3_megatron.engine.megatron import MegatronEngine
from bd3_megatron.engine.stage import named_parameters
from pretrain.commands import estimate
from pretrain.config.resolve import resolve
from pretrain.distributed.spawn import run_world
from pretrain.estimate.cpu_peak import process_peak
from pretrain.estimate.devices import Device

# A vocabulary that no tensor-parallel size divides.
QWEN3 = ModelConfig(layers=5, hidden=32, heads=4, kv_heads=2, length=32, vocab_size=61, mask_id=60)
MODELS = {
    "qwen3": QWEN3,
    "dit": ModelConfig(backbone="dit", layers=5, hidden=32, heads=4, length=32, vocab_size=61, mask_id=60),
    "tied": QWEN3.model_copy(update={"tie_embeddings": True}),
}
LAYOUTS = {
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2, "head_weight": 1.0}),
    "PP2-interleaved": (2, {"pipeline": 2, "interleave": 2}),
    "PP2+distopt": (2, {"pipeline": 2, "distributed_optimizer": True}),
    "DP2+distopt": (2, {"distributed_optimizer": True}),
    "CP2+distopt": (2, {"context": 2, "distributed_optimizer": True}),
    "PP3": (3, {"pipeline": 3}),
}
CASES = [(model, layout, precision) for model in MODELS for layout in LAYOUTS for precision in ("fp32", "bf16")]


def config_of(model: ModelConfig, precision: str, **sections: Section) -> EngineConfig:
    optimization = OptimizationConfig(precision=precision)
    return EngineConfig(model=model, diffusion=DiffusionConfig(block_size=4), optimization=optimization, **sections)


def measured(rank: int, size: int, store: dist.Store, cases: list[tuple[str, str, str]]) -> list[dict]:
    """This rank's coordinates, parameters, and bytes of its engine's tensors, for each case."""
    found = []
    for name, layout, precision in cases:
        options = ParallelConfig(**LAYOUTS[layout][1])
        world = parallel.start(options, rank, size, rank, dist.PrefixStore(f"{name} {layout} {precision}", store))
        engine = MegatronEngine(config_of(MODELS[name], precision, parallel=options), world)
        masters = engine.masters.masters.values()
        buffers = [buffer for chunk in engine.chunks for buffer in chunk.buffers]
        parameters = [(n, tuple(p.shape)) for n, p, _ in named_parameters(engine.modules)]
        weights = {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in engine.modules for p in m.parameters()
        }
        own = {m.weight.untyped_storage().data_ptr() for m in masters} - set(weights)
        found.append(
            {
                "stage": dist.get_rank(parallel_state.get_pipeline_model_parallel_group()),
                "data": dist.get_rank(parallel_state.get_data_parallel_group(with_context_parallel=True)),
                "data_size": world.data_size,
                "parameters": parameters,
                "weights": sum(weights.values()),
                "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
                "masters": sum(m.weight.nbytes for m in masters if m.weight.untyped_storage().data_ptr() in own),
                "moments": sum(m.exp_avg.nbytes + m.exp_avg_sq.nbytes for m in masters),
                "ema": sum(x.nbytes for x in engine.masters.ema.values()),
            }
        )
        parallel.stop()
    return found


@pytest.fixture(scope="module")
def worlds() -> dict[tuple[str, str, str], list[dict]]:
    found: dict[tuple[str, str, str], list[dict]] = {case: [] for case in CASES}
    for size in {size for size, _ in LAYOUTS.values()}:
        cases = [case for case in CASES if LAYOUTS[case[1]][0] == size]
        for by_case in run_world(size, measured, cases):
            for case, outcome in zip(cases, by_case):
                found[case].append(outcome)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_memory_of_every_rank_is_as_counted(worlds, case):
    name, layout, precision = case
    model, options = MODELS[name], ParallelConfig(**LAYOUTS[layout][1])
    config = config_of(model, precision, parallel=options)
    for rank in worlds[case]:
        chunks = stage_chunks(model, options)[rank["stage"]]
        expected = [item for chunk in chunks for item in parameter_shapes(model, chunk, options.tensor).items()]
        assert rank["parameters"] == expected
        states = state_bytes(config, rank["data_size"], rank["stage"])
        state = states[rank["data"] if len(states) > 1 else 0]
        assert state.parts() == {part: rank[part] for part in state.parts()}


# ---- DeepSpeed ----

ZERO = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]


def partitions(rank: int, size: int, store: dist.Store, cases: list[tuple[int, str]]) -> list[dict[str, int]]:
    """Of each case: bytes of what this rank's partitions hold."""
    found, alone = [], ParallelConfig()
    for stage, precision in cases:
        world = parallel.start(alone, rank, size, rank, dist.PrefixStore(f"{stage} {precision}", store))
        engine = build_engine(config_of(QWEN3, precision, zero=ZeroConfig(stage=stage)), world)
        flats = engine._partitions()
        slots = [engine.adam.state[flat] for flat in flats]
        found.append(
            {
                "masters": sum(flat.nbytes for flat in flats),
                "moments": sum(slot["exp_avg"].nbytes + slot["exp_avg_sq"].nbytes for slot in slots),
                "ema": sum(x.nbytes for x in engine.masters.ema.values()),
            }
        )
        parallel.stop()
    return found


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero_partitions_are_as_large_as_counted():
    first, _ = run_world(2, partitions, ZERO)
    for (stage, precision), bytes_by_part in zip(ZERO, first):
        (state,) = state_bytes(config_of(QWEN3, precision, zero=ZeroConfig(stage=stage)), 2)
        assert {name: state.parts()[name] for name in bytes_by_part} == bytes_by_part, (stage, precision)


# ---- a process on the CPU ----


@pytest.mark.long
def test_a_process_takes_the_memory_that_is_predicted(data_set, tmp_path, monkeypatch):
    sizes = {"layers": 6, "hidden": 256, "heads": 4, "kv-heads": 2, "length": 32}
    args = ["--data.path", str(data_set), "--train.precision", "fp32", "--train.steps", "3", "--checkpoint.every", "2"]
    args += ["--train.micro-batch", "32", "--train.global-batch", "32", "--eval.rows", "8", "--eval.every", "0"]
    args += [word for name, value in sizes.items() for word in (f"--model.{name}", str(value))]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "pretrain.cli", "pretrain", *args, "--run", str(tmp_path / "run")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    measured = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    monkeypatch.setattr(estimate, "this_cpu", lambda: Device("CPU", 1e11, None, 1e11, 2e10, 1e10, 1e10, 1e10))
    config, options = resolve(estimate.EstimateOptions, [*args, "--device", "cpu"], "test")
    assert sum(process_peak(estimate.predict(config, options)).values()) == pytest.approx(measured, rel=0.15)
