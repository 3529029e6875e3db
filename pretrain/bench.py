"""`bd3 bench`: what the pieces cost, as ratios within one run, because machines differ and are shared."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from pydantic import Field

from bd3_megatron import flops, parallel
from bd3_megatron.attention.mask import Streams
from bd3_megatron.config import (
    ConfigError,
    DiffusionConfig,
    KernelConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
    Section,
    check_layout,
)
from bd3_megatron.diffusion.batch import Batch, diffusion_batch
from bd3_megatron.diffusion.noise import SampleKeys, draw_noise
from bd3_megatron.engine.megatron import MegatronEngine
from bd3_megatron.parallel import World
from pretrain.options import did_you_mean, parse_options, validate

# What the step is compared with: the dense (2L)^2 mask, and logits for every row of both streams.
PLAIN = KernelConfig(attention="reference", masked_rows_only=False)


class StepOptions(Section):
    """Cost of one training step (forward, backward, optimizer, EMA) beside the plain path of the same model:
    dense two-stream mask and logits for every row. CPU time of one process on CPU, wall time on CUDA."""

    lengths: tuple[Annotated[int, Field(ge=2)], ...] = Field((256, 1024), min_length=1, description="row lengths L")
    backbone: Literal["dit", "qwen3"] = Field("dit", description="the paper's backbone or the Qwen3-shaped one")
    layers: int = Field(4, ge=1)
    hidden: int = Field(256, ge=1)
    heads: int = Field(4, ge=1)
    block_size: int = Field(16, ge=1, description="tokens per block, B'")
    vocab_size: int = Field(4096, ge=2)
    batch: int = Field(8, ge=1, description="rows per step")
    threads: int = Field(1, ge=1, description="CPU threads")
    repeats: int = Field(5, ge=1, description="measured steps of each path; they take turns")
    precision: Literal["fp32", "bf16"] = Field("fp32")
    json_: Annotated[bool, tyro.conf.arg(name="json")] = Field(False, description="print one line of JSON")


def main(args: list[str]) -> int:
    """`bd3 bench NAME`; the exit code."""
    from pretrain.bench_checkpoint import bench_checkpoint  # it takes its model and rows from this module

    commands: dict[str, Callable[[list[str]], None]] = {"step": bench_step, "checkpoint": bench_checkpoint}
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: bd3 bench {'|'.join(commands)}   (--help after it for options)")
        return 0 if args else 2
    if args[0] not in commands:
        raise ConfigError(f"bd3 bench {args[0]}: unknown benchmark{did_you_mean(args[0], commands)}")
    commands[args[0]](args[1:])
    return 0


def bench_step(args: list[str]) -> None:
    """Print a row per length: seconds of both paths, their ratio, and the ratio of their FLOPs."""
    options = parse_options(StepOptions, args, "bd3 bench step")
    diffusion = DiffusionConfig(block_size=options.block_size)
    models = [bench_model(options, length) for length in options.lengths]
    for model in models:
        check_layout(model, diffusion, ParallelConfig(), world_size=1)
    torch.set_num_threads(options.threads)
    world = parallel.start(ParallelConfig())
    try:
        rows = [_step_row(options, model, diffusion, world) for model in models]
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


def bench_model(options: Section, length: int) -> ModelConfig:
    """The model that a benchmark's options describe."""
    values = {
        "backbone": options.backbone,
        "layers": options.layers,
        "hidden": options.hidden,
        "heads": options.heads,
        "ffn_hidden": 4 * options.hidden if options.backbone == "dit" else _gated_width(options.hidden),
        "length": length,
        "vocab_size": options.vocab_size,
        "mask_id": options.vocab_size - 1,
    }
    return validate(ModelConfig, values)


def _step_row(options: StepOptions, model: ModelConfig, diffusion: DiffusionConfig, world: World) -> dict[str, float]:
    optimization = OptimizationConfig(precision=options.precision)
    batches = [random_batch(model, diffusion, options.batch, step) for step in range(options.repeats + 1)]
    paths = []
    for kernels in (KernelConfig(), PLAIN):
        engine = MegatronEngine(model, diffusion, kernels, ParallelConfig(), optimization, world)
        paths.append(partial(_timed_step, engine))
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


def _gated_width(hidden: int) -> int:
    """MLP width with which SwiGLU's three matrices have the weights of a 4x MLP's two."""
    return -(-8 * hidden // 3 // 16) * 16


def random_batch(model: ModelConfig, diffusion: DiffusionConfig, rows: int, step: int) -> Batch:
    """A micro-batch of random rows with the noise of ``step``."""
    numbers = np.arange(rows)
    tokens = np.random.default_rng(step).integers(0, model.vocab_size - 1, (rows, model.length))
    noise = draw_noise(diffusion, model.length, 0, SampleKeys(np.zeros_like(numbers), numbers, numbers, step, rows))
    return diffusion_batch(tokens, noise, model.mask_id, Streams.of(diffusion, model.length))


def _timed_step(engine: MegatronEngine, batch: Batch) -> float:
    cuda = engine.world.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    engine.train_step([batch], lr=1e-4)
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def _flop_ratio(model: ModelConfig, diffusion: DiffusionConfig) -> float:
    """FLOPs of the step as computed today (the last layer's clean stream in full) over those of the plain path."""
    layer = 2 * sum(flops.layer_parameters(model).values())
    pair, head = 4 * model.heads * model.width_per_head, 2 * model.hidden * model.vocab_size
    live = model.length + diffusion.block_size  # pairs per position, both streams together
    ours = model.layers * (2 * layer + live * pair) + 0.5 * head
    plain = model.layers * (2 * layer + 4 * model.length * pair) + 2 * head
    return ours / plain
