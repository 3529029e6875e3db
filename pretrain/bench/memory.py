"""`bd3 bench memory`: activations that a training step keeps for its backward pass, by kind of recomputation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bd3_common.text import counted
from bd3_megatron import parallel
from bd3_megatron.config import (
    DiffusionConfig,
    EngineConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
)
from bd3_megatron.diffusion.batches import Batch
from bd3_megatron.engine.megatron import MegatronEngine
from pretrain.bench.models import model_of, random_batch, timed_step
from pretrain.bench.options import MemoryOptions


class Saved:
    """Bytes of distinct storages that autograd keeps at present, and their peak."""

    def __init__(self, ignored: set[int]):
        self._ignored = ignored
        self._uses: Counter[int] = Counter()
        self.bytes = self.peak = 0

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if key in self._ignored:
            return
        self._uses[key] += 1
        if self._uses[key] == 1:
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)

    def remove(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if key in self._ignored:
            return
        self._uses[key] -= 1
        if self._uses[key] == 0:
            self.bytes -= storage.nbytes()


class _Kept:
    """A saved tensor that is counted until autograd releases it."""

    def __init__(self, tensor: torch.Tensor, saved: Saved):
        self.tensor, self._saved = tensor, saved
        saved.add(tensor.untyped_storage())

    def __del__(self) -> None:
        self._saved.remove(self.tensor.untyped_storage())


@contextmanager
def saved_for_backward(parameters: Iterator[torch.Tensor]) -> Iterator[Saved]:
    """Count what autograd saves inside the context, without ``parameters``, which stay in memory anyway."""
    saved = Saved({parameter.untyped_storage().data_ptr() for parameter in parameters})
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(tensor, saved), lambda kept: kept.tensor):
        yield saved


def bench_memory(options: MemoryOptions) -> None:
    """Print a row per kind of recomputation."""
    model, diffusion = model_of(options, options.length)
    torch.set_num_threads(options.threads)
    batch = random_batch(model, diffusion, options.batch, 0)
    rows = [_row(kind, model, diffusion, batch) for kind in ("none", "selective", "full")]
    for row in rows:
        row["bytes_per_token"] = row["saved_bytes"] / (options.batch * options.length)
        row["ratio"] = row["saved_bytes"] / rows[0]["saved_bytes"]
        row["seconds_ratio"] = row["seconds"] / rows[0]["seconds"]
    if options.json_:
        print(json.dumps({"rows": rows}))
        return
    print(
        f"{options.layers} layers of {options.hidden}, L={options.length}, B'={options.block_size}, "
        f"{counted(options.batch, 'row')}, fp32; kept for the backward pass"
    )
    print(f"{'recompute':<12}{'MB':>10}{'per token':>12}{'ratio':>8}{'seconds':>10}{'ratio':>8}")
    for row in rows:
        print(
            f"{row['recompute']:<12}{row['saved_bytes'] / 1e6:>10.1f}{row['bytes_per_token']:>12.0f}"
            f"{row['ratio']:>8.3f}{row['seconds']:>10.3f}{row['seconds_ratio']:>8.2f}"
        )


def _row(kind: str, model: ModelConfig, diffusion: DiffusionConfig, batch: Batch) -> dict[str, Any]:
    layout = ParallelConfig(recompute=kind)
    world = parallel.start(layout)
    try:
        optimization = OptimizationConfig(precision="fp32")
        config = EngineConfig(model=model, diffusion=diffusion, parallel=layout, optimization=optimization)
        engine = MegatronEngine(config, world)
        timed_step(engine, batch)  # warm up
        row = {"recompute": kind, "seconds": timed_step(engine, batch)}
        cuda = world.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with saved_for_backward(engine.module.parameters()) as saved:
            engine.train_step([batch], lr=1e-4)
        return row | {"saved_bytes": saved.peak} | ({"peak_bytes": torch.cuda.max_memory_allocated()} if cuda else {})
    finally:
        parallel.stop()
