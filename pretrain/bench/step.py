"""`bd3 bench step`: cost of a training step beside the plain path of the same model."""

from __future__ import annotations

import json
import statistics
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field

from bd3_megatron import flops, parallel
from bd3_megatron.config import (
    DiffusionConfig,
    KernelConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
)
from bd3_megatron.engine.megatron import MegatronEngine
from bd3_megatron.parallel import World
from pretrain.bench.models import ModelOptions, model_of, random_batch, timed_step
from pretrain.options import parse_options

# What the step is compared with: the dense (2L)^2 mask, and logits for every row of both streams.
PLAIN = KernelConfig(attention="reference", masked_rows_only=False)


class StepOptions(ModelOptions):
    """Cost of one training step (forward, backward, optimizer, EMA) beside the plain path of the same model:
    dense two-stream mask and logits for every row. CPU time of one process on CPU, wall time on CUDA."""

    lengths: tuple[Annotated[int, Field(ge=2)], ...] = Field((256, 1024), min_length=1, description="row lengths L")
    repeats: int = Field(5, ge=1, description="measured steps of each path; they take turns")
    precision: Literal["fp32", "bf16"] = Field("fp32")


def bench_step(args: list[str]) -> None:
    """Print a row per length: seconds of both paths, their ratio, and the ratio of their FLOPs."""
    options = parse_options(StepOptions, args, "bd3 bench step")
    models = [model_of(options, length) for length in options.lengths]
    torch.set_num_threads(options.threads)
    world = parallel.start(ParallelConfig())
    try:
        rows = [_step_row(options, model, diffusion, world) for model, diffusion in models]
    finally:
        parallel.stop()
    if options.json_:
        print(json.dumps({"rows": rows}))
        return
    print(
        f"training step, {world.device.type}, {options.threads} thread(s), {options.precision}, B'={options.block_size}"
    )
    print(f"{'length':>7}{'seconds':>10}{'plain':>10}{'ratio':>8}{'by FLOPs':>10}{'data tok/s':>12}")
    for row in rows:
        print(
            f"{row['length']:>7}{row['seconds']:>10.3f}{row['plain_seconds']:>10.3f}{row['ratio']:>8.3f}"
            f"{row['flop_ratio']:>10.3f}{row['tokens_per_second']:>12.0f}"
        )


def _step_row(options: StepOptions, model: ModelConfig, diffusion: DiffusionConfig, world: World) -> dict[str, float]:
    optimization = OptimizationConfig(precision=options.precision)
    batches = [random_batch(model, diffusion, options.batch, step) for step in range(options.repeats + 1)]
    paths = []
    for kernels in (KernelConfig(), PLAIN):
        engine = MegatronEngine(model, diffusion, kernels, ParallelConfig(), optimization, world)
        paths.append(partial(timed_step, engine))
    for path in paths:  # warm up
        path(batches[-1])
    turns = [[path(batch) for path in paths] for batch in batches[: options.repeats]]
    ours, plain = (statistics.median(times) for times in zip(*turns))
    return {
        "length": model.length,
        "ratio": statistics.median(a / b for a, b in turns),
        "seconds": ours,
        "plain_seconds": plain,
        "flop_ratio": _flop_ratio(model, diffusion),
        "tokens_per_second": options.batch * model.length / ours,
    }


def _flop_ratio(model: ModelConfig, diffusion: DiffusionConfig) -> float:
    """FLOPs of the step as computed today (the last layer's clean stream in full) over those of the plain path."""
    layer = 2 * sum(flops.layer_parameters(model).values())
    pair, head = 4 * model.heads * model.width_per_head, 2 * model.hidden * model.vocab_size
    live = model.length + diffusion.block_size  # pairs per position, both streams together
    ours = model.layers * (2 * layer + live * pair) + 0.5 * head
    plain = model.layers * (2 * layer + 4 * model.length * pair) + 2 * head
    return ours / plain
