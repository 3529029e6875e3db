"""What the ranks of a distributed test do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bd3_megatron import parallel
from bd3_megatron.attention.mask import Streams
from bd3_megatron.config import (
    DiffusionConfig,
    KernelConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
    ZeroConfig,
)
from bd3_megatron.diffusion.batch import Batch, diffusion_batch
from bd3_megatron.diffusion.noise import SampleKeys, draw_noise
from bd3_megatron.engine import build_engine
from bd3_megatron.engine.base import Engine
from bd3_megatron.shards import Held
from pretrain import checkpoint

GLOBAL_BATCH, MICRO_BATCH, STEPS = 8, 2, 3
BETA1 = 0.9
MEGATRON = ZeroConfig()


@dataclass(frozen=True)
class Outcome:
    """Of a few steps: losses, gradient norms, the first step's gradients, and the state after the last."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    nll: torch.Tensor


def several(rank: int, size: int, store: dist.Store, calls: list[tuple[Callable[..., Any], tuple]]) -> list[Any]:
    """Call functions of this module, with their arguments after the store, one after the other in one world."""
    return [
        function(rank, size, dist.PrefixStore(str(number), store), *args)
        for number, (function, args) in enumerate(calls)
    ]


def train(
    rank: int,
    size: int,
    store: dist.Store,
    runs: list[tuple[str, ModelConfig, DiffusionConfig, ParallelConfig, ZeroConfig]],
    steps: int = STEPS,
    optimization: Mapping[str, Any] | None = None,
) -> list[Outcome]:
    """Train each of ``runs`` for a few steps, one after the other in the same processes."""
    outcomes = []
    for name, model, diffusion, layout, *zero in runs:
        world = parallel.start(layout, rank, size, rank, dist.PrefixStore(name, store))
        try:
            outcomes.append(_train(world, model, diffusion, layout, *zero, steps=steps, changes=optimization))
        finally:
            parallel.stop()
    return outcomes


def resume(
    rank: int,
    size: int,
    store: dist.Store,
    run: Path,
    model: ModelConfig,
    diffusion: DiffusionConfig,
    layout: ParallelConfig,
    until: int,
    zero: ZeroConfig = MEGATRON,
) -> list[float]:
    """Go on from the run's newest checkpoint, if any, up to step ``until``, save there; losses of the steps taken."""
    world = parallel.start(layout, rank, size, rank, store)
    try:
        engine = _engine(world, model, diffusion, layout, zero)
        found = checkpoint.newest(run)
        if found is not None:
            checkpoint.restore(found, engine)
        losses = []
        for step in range(found.step if found else 0, until):
            parallel.seed_dropout(0, step)
            losses.append(engine.train_step(batches(world, model, diffusion, step), lr=1e-3).loss)
        checkpoint.save(run, engine, until, {}, keep=10)
        return losses
    finally:
        parallel.stop()


def _engine(
    world: parallel.World,
    model: ModelConfig,
    diffusion: DiffusionConfig,
    layout: ParallelConfig,
    zero: ZeroConfig = MEGATRON,
    changes: Mapping[str, Any] | None = None,
) -> Engine:
    # No clipping, so that Adam's first moment after one step is (1 - beta1) times the gradient. A larger epsilon than
    # usual: Adam divides by it where a gradient is rounding error, whose sign no layout owes.
    optimization = OptimizationConfig(
        **{"precision": "fp32", "clip_norm": 0, "ema_decay": 0.9, "beta1": BETA1, "weight_decay": 0.1, "adam_eps": 1e-4}
        | dict(changes or {})
    )
    return build_engine(model, diffusion, KernelConfig(), layout, zero, optimization, world, seed=3)


def _train(
    world: parallel.World,
    model: ModelConfig,
    diffusion: DiffusionConfig,
    layout: ParallelConfig,
    zero: ZeroConfig = MEGATRON,
    steps: int = STEPS,
    changes: Mapping[str, Any] | None = None,
) -> Outcome:
    engine = _engine(world, model, diffusion, layout, zero, changes)
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        parallel.seed_dropout(0, step)
        result = engine.train_step(batches(world, model, diffusion, step), lr=1e-3)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if step == 0:
            gradients = {
                name.removeprefix("exp_avg/"): moment / (1 - BETA1)
                for name, moment in whole(engine.state()).items()
                if name.startswith("exp_avg/")
            }
    with engine.averaged():
        nll = torch.cat(engine.forward(batches(world, model, diffusion, steps)))
    return Outcome(losses, norms, gradients, whole(engine.state()), nll)


def batches(world: parallel.World, model: ModelConfig, diffusion: DiffusionConfig, step: int) -> list[Batch]:
    """This data-parallel rank's micro-batches of random rows."""
    rows = np.random.default_rng(step).integers(0, model.mask_id, (GLOBAL_BATCH, model.length))
    share = GLOBAL_BATCH // world.data_size
    mine = np.arange(world.data_rank * share, (world.data_rank + 1) * share)
    made = []
    for start in range(0, share, MICRO_BATCH):
        slots = mine[start : start + MICRO_BATCH]
        keys = SampleKeys(np.zeros_like(slots), slots, slots, step, GLOBAL_BATCH)
        noise = draw_noise(diffusion, model.length, 0, keys)
        made.append(diffusion_batch(rows[slots], noise, model.mask_id, Streams.of(diffusion, model.length)))
    return made


def whole(state: dict[str, Held]) -> dict[str, torch.Tensor]:
    """The whole state on every rank, from the boxes of all."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, state)
    tensors: dict[str, torch.Tensor] = {}
    for part in everyone:
        for name, held in part.items():
            tensor = tensors.setdefault(name, torch.full(held.shape, torch.nan))
            for piece in held.pieces:
                box = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.data.shape))
                tensor[box] = piece.data
    assert not any(tensor.isnan().any() for tensor in tensors.values())
    return tensors
