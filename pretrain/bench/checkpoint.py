"""`bd3 bench checkpoint`: cost of a checkpoint, in bytes and in time lost to training."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bd3_common.text import counted
from bd3_megatron import parallel
from bd3_megatron.config import (
    EngineConfig,
    OptimizationConfig,
    ParallelConfig,
)
from bd3_megatron.engine.megatron import MegatronEngine
from pretrain.bench.models import model_of, random_batch
from pretrain.bench.options import CheckpointOptions
from pretrain.checkpoint.reader import find_checkpoint, restore
from pretrain.checkpoint.writer import CheckpointWriter, Written


def bench_checkpoint(options: CheckpointOptions) -> None:
    """Print bytes, seconds and their ratios."""
    model, diffusion = model_of(options, options.length)
    torch.set_num_threads(options.threads)
    world = parallel.start(ParallelConfig())
    try:
        optimization = OptimizationConfig(precision=options.precision)
        engine = MegatronEngine(EngineConfig(model=model, diffusion=diffusion, optimization=optimization), world)
        batch = random_batch(model, diffusion, options.batch, step=0)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = _measure(engine, lambda: engine.train_step([batch], lr=1e-4), Path(folder), options.repeats)
    finally:
        parallel.stop()
    found = {"parameters": model.parameters(model.vocab_size)} | found
    found["bytes_per_parameter"] = found["bytes"] / found["parameters"]
    if options.json_:
        print(json.dumps(found))
        return
    print(
        f"checkpoint, {world.device.type}, {counted(options.threads, 'thread')}, "
        f"{found['parameters'] / 1e6:.2f}M parameters: {found['bytes'] / 1e6:.1f} MB, "
        f"{found['bytes_per_parameter']:.2f} bytes per parameter"
    )
    print(f"{'seconds':>24}{'background':>12}{'waited for':>12}{'ratio':>8}")
    for name in ("stall", "lost", "write"):
        ours, plain = found[f"{name}_seconds"], found[f"waited_{name}_seconds"]
        print(f"{name:>24}{ours:>12.4f}{plain:>12.4f}{ours / plain:>8.3f}")
    for name in ("step", "find", "load"):
        print(f"{name:>24}{found[f'{name}_seconds']:>12.4f}")


def _measure(engine: MegatronEngine, step: Callable[[], object], folder: Path, repeats: int) -> dict[str, float]:
    """Medians. ``lost``: time until the checkpoint is complete, minus that of the steps taken meanwhile."""
    step()  # warm up
    alone = statistics.median(_seconds(step) for _ in range(2 * repeats))
    values: dict[str, list[float]] = {}
    written: list[Written] = []
    kinds = {
        prefix: CheckpointWriter(folder, engine, 1, asynchronous=prefix == "", report=written.append)
        for prefix in ("", "waited_")
    }
    for turn in range(repeats + 1):
        for prefix, writer in kinds.items():
            steps, begin = 0, time.perf_counter()
            writer.save(turn, {})
            while not written:
                step()
                steps += 1
                writer.poll()
            lost = time.perf_counter() - begin - steps * alone
            result = written.pop()
            if turn > 0:  # the first one allocates the copies
                values.setdefault(f"{prefix}stall_seconds", []).append(result.stall_seconds)
                values.setdefault(f"{prefix}lost_seconds", []).append(lost)
                values.setdefault(f"{prefix}write_seconds", []).append(result.write_seconds)
    for writer in kinds.values():
        writer.close()
    for _ in range(repeats):
        values.setdefault("find_seconds", []).append(_seconds(lambda: find_checkpoint(folder)))
        found = find_checkpoint(folder)
        values.setdefault("load_seconds", []).append(_seconds(lambda: restore(found, engine)))  # noqa: B023
    size = sum(file.stat().st_size for file in found.path.iterdir())
    return {"bytes": size, "step_seconds": alone} | {name: statistics.median(x) for name, x in values.items()}


def _seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin
