"""`bd3 bench step`: cost of a training step beside the plain path and beside an autoregressive step."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bd3_common.errors import ConfigError
from bd3_common.text import counted
from bd3_megatron import parallel
from bd3_megatron.config import (
    PLAIN,
    DiffusionConfig,
    EngineConfig,
    Fp8Config,
    KernelConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
)
from bd3_megatron.cost import flops
from bd3_megatron.diffusion.batches import Batch
from bd3_megatron.engine.megatron import MegatronEngine
from bd3_megatron.layers import transformer_engine as te
from bd3_megatron.layers.fp8 import check_fp8
from bd3_megatron.parallel import World
from pretrain.bench.models import checked_plot, model_of, plot_rows, random_batch, timed_step
from pretrain.bench.options import StepOptions
from pretrain.config.resolve import preset_config
from pretrain.estimate.devices import measured_matmul_flops, peak_flops

CAUSAL = DiffusionConfig(objective="causal", block_size=1)
VOCABULARY = 50258  # GPT-2's with the mask, where a preset leaves it to the data


def bench_step(options: StepOptions) -> None:
    """Print a row per length: seconds of all paths, their ratios, and the ratios of their FLOPs."""
    checked_plot(options.plot)
    models = _models(options)
    _check(options, models)
    torch.set_num_threads(options.threads)
    layout = ParallelConfig(recompute=options.recompute)
    world = parallel.start(layout)
    try:
        rows = [_step_row(options, layout, model, diffusion, world) for model, diffusion in models]
    finally:
        parallel.stop()
    if options.plot is not None:
        lines = {name: name.replace("_", " ") for name in ("ratio", "of_causal") if name in rows[0]}
        plot_rows(Path(options.plot), rows, lines, "training step", "ratio of seconds")
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
    if options.json_:
        print(json.dumps({"device": device, "precision": options.precision, "rows": rows}))
        return
    print(
        f"training step, {device}, {counted(options.threads, 'thread')}, {options.precision}, "
        f"B'={models[0][1].block_size}, {counted(options.draws, 'draw')}; MFU of the peak, useful FLOPs and 6 N D"
    )
    for row in rows:
        _print(row)


def _fp8(options: StepOptions) -> Fp8Config:
    return Fp8Config() if options.fp8 == "none" else Fp8Config(enabled=True, recipe=options.fp8)


def _check(options: StepOptions, models: list[tuple[ModelConfig, DiffusionConfig]]) -> None:
    """Check the kind of layers and FP8 before anything is built.

    Raises:
        ConfigError: Transformer Engine is missing, or FP8 does not support these sizes.
    """
    kernels = KernelConfig(layers=options.layers_kind)
    for model, _ in models:
        precision = OptimizationConfig(precision=options.precision)
        check_fp8(EngineConfig(model=model, kernels=kernels, fp8=_fp8(options), optimization=precision))
    te.check(kernels, _fp8(options))


def _models(options: StepOptions) -> list[tuple[ModelConfig, DiffusionConfig]]:
    """Model and objective for every length.

    Raises:
        ConfigError: no such preset, or sizes that do not fit.
    """
    draws = {"draws": options.draws}
    if options.preset is None:
        made = [model_of(options, length) for length in options.lengths or (256, 1024)]
        return [(model, diffusion.model_copy(update=draws)) for model, diffusion in made]
    config = preset_config(options.preset)
    vocabulary = config.model.vocab_size or VOCABULARY
    made = []
    for length in options.lengths or (config.model.length,):
        if length % config.diffusion.block_size:
            block = config.diffusion.block_size
            raise ConfigError(
                f"--lengths={length}: not divisible by diffusion.block_size={block} of the preset; "
                f"use a multiple of {block}"
            )
        ids = {"vocab_size": vocabulary, "mask_id": vocabulary - 1, "length": length}
        made.append((config.model.model_copy(update=ids), config.diffusion.model_copy(update=draws)))
    return made


def _step_row(
    options: StepOptions, layout: ParallelConfig, model: ModelConfig, diffusion: DiffusionConfig, world: World
) -> dict[str, Any]:
    kinds = {"ours": (KernelConfig(attention=options.attention, layers=options.layers_kind), diffusion)}
    if options.plain:
        kinds["plain"] = PLAIN, diffusion
    if options.causal:
        kinds["causal"] = KernelConfig(), CAUSAL
    times, peak = _measure(options, layout, model, kinds, world)
    median = {name: statistics.median(column) for name, column in times.items()}
    tokens = options.batch * model.length / median["ours"]
    ceiling = measured_matmul_flops(torch.bfloat16 if options.precision == "bf16" else torch.float32)
    useful, yardstick = flops.training_flops_per_token(model, diffusion), flops.six_n(model)
    limit = peak_flops(None, options.precision) if world.device.type == "cuda" else ceiling
    row = {
        "length": model.length,
        "seconds": median["ours"],
        "tokens_per_second": tokens,
        "useful_tflops": useful * tokens / 1e12,
        "mfu_useful": useful * tokens / limit,
        "mfu_6nd": yardstick * tokens / limit,
        "matmul_tflops": ceiling / 1e12,
    }
    for name, key in (("plain", "ratio"), ("causal", "of_causal")):
        if name in times:
            row[f"{name}_seconds"] = median[name]
            row[key] = statistics.median(a / b for a, b in zip(times["ours"], times[name]))
    if options.plain:
        row["flop_ratio"] = flops.forward_flops(model, diffusion).total / flops.plain_forward_flops(model, diffusion)
    if options.causal:
        row["flops_of_causal"] = useful / flops.training_flops_per_token(model, CAUSAL)
    return row | ({"peak_bytes": peak} if peak else {})


def _measure(
    options: StepOptions,
    layout: ParallelConfig,
    model: ModelConfig,
    kinds: dict[str, tuple[KernelConfig, DiffusionConfig]],
    world: World,
) -> tuple[dict[str, list[float]], int]:
    """Seconds of every path at every turn, and our peak of device memory in bytes (0 on CPU)."""
    optimization = OptimizationConfig(precision=options.precision)
    peak, paths = 0, {}
    for name, (kernels, diffusion) in kinds.items():
        config = EngineConfig(
            model=model,
            diffusion=diffusion,
            kernels=kernels,
            fp8=_fp8(options) if name == "ours" else Fp8Config(),
            parallel=layout,
            optimization=optimization,
        )
        engine = MegatronEngine(config, world)
        batches = [random_batch(model, diffusion, options.batch, step) for step in range(options.repeats + 1)]
        path: Callable[[Batch], float] = partial(timed_step, engine)
        path(batches[-1])  # warm up
        if name == "ours" and world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            path(batches[-1])
            peak = torch.cuda.max_memory_allocated()
        paths[name] = path, batches
    times: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(options.repeats):
        for name, (path, batches) in paths.items():
            times[name].append(path(batches[turn]))
    return times, peak


def _print(row: dict[str, Any]) -> None:
    print(
        f"L={row['length']}: {row['seconds']:.4g} s, {row['tokens_per_second']:.0f} data tokens/s, "
        f"MFU {row['mfu_useful']:.1%} and {row['mfu_6nd']:.1%}, {row['useful_tflops']:.3g} useful TFLOP/s "
        f"(a matmul: {row['matmul_tflops']:.3g})"
    )
    for name, key, by_flops, what in (
        ("plain", "ratio", "flop_ratio", "the plain path"),
        ("causal", "of_causal", "flops_of_causal", "an autoregressive step"),
    ):
        if key in row:
            print(f"  {row[key]:.3f} of {what} ({row[f'{name}_seconds']:.4g} s); {row[by_flops]:.3f} by FLOPs")
    if "peak_bytes" in row:
        print(f"  peak memory {row['peak_bytes'] / 1e9:.2f} GB")
