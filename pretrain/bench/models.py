"""Models, rows, clocks and plots that benchmarks share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bd3_common.errors import ConfigError
from bd3_megatron.attention.mask import Streams
from bd3_megatron.backbones import BACKBONES
from bd3_megatron.config import DiffusionConfig, EngineConfig, ModelConfig
from bd3_megatron.diffusion.batches import Batch, causal_batch, diffusion_batch
from bd3_megatron.diffusion.noise import SampleKeys, draw_noise
from bd3_megatron.engine.base import Engine
from bd3_megatron.layout import check_layout
from pretrain.bench.options import ModelOptions
from pretrain.config.values import validate
from pretrain.tracking.plots import finish, new_figure, save_figure

_PASSES = 10  # in one measurement on CUDA, so that launches overlap as they do in training


def model_of(options: ModelOptions, length: int) -> tuple[ModelConfig, DiffusionConfig]:
    """A model whose layers have 12 h^2 weights on every backbone, and its objective.

    Raises:
        ConfigError: sizes that do not fit.
    """
    hidden = options.hidden
    # A gated MLP has three matrices, an ungated one two.
    gated = -(-8 * hidden // 3 // 16) * 16
    values = {name: getattr(options, name) for name in ("backbone", "layers", "hidden", "heads", "vocab_size")}
    more = {"ffn_hidden": gated if BACKBONES.instance(options.backbone).traits.gated else 4 * hidden, "length": length}
    model = validate(ModelConfig, values | more | {"mask_id": options.vocab_size - 1})
    diffusion = DiffusionConfig(block_size=options.block_size)
    check_layout(EngineConfig(model=model, diffusion=diffusion), world_size=1)
    return model, diffusion


def random_batch(model: ModelConfig, diffusion: DiffusionConfig, rows: int, step: int) -> Batch:
    """A micro-batch of random rows with the noise of ``step``."""
    numbers = np.arange(rows)
    tokens = np.random.default_rng(step).integers(0, model.vocab_size - 1, (rows, model.length))
    if diffusion.objective == "causal":
        return causal_batch(tokens)
    noise = draw_noise(diffusion, model.length, 0, SampleKeys(np.zeros_like(numbers), numbers, numbers, step, rows))
    return diffusion_batch(tokens, noise, model.mask_id, Streams.of(diffusion, model.length))


def checked_plot(file: str | None) -> None:
    """Check, before anything is measured, that a plot can be written.

    Raises:
        ConfigError: there is no such folder.
    """
    if file is not None and not (folder := Path(file).parent).is_dir():
        raise ConfigError(f"--plot={file}: there is no folder {folder}; make it first")


def plot_rows(file: Path, rows: Sequence[Mapping[str, Any]], lines: Mapping[str, str], title: str, unit: str) -> None:
    """PNG of some columns of ``rows`` against their ``length``; ``lines`` gives each column's label."""
    figure = new_figure(6)
    axes = figure.subplots()
    for column, label in lines.items():
        axes.plot([row["length"] for row in rows], [row[column] for row in rows], "o-", label=label)
    axes.set(title=title, xlabel="row length", ylabel=unit, xscale="log")
    finish(axes)
    save_figure(figure, file)


def timed_step(engine: Engine, batch: Batch) -> float:
    """Seconds of one training step: CPU time on CPU, wall time on CUDA."""
    cuda = engine.world.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    engine.train_step([batch], lr=1e-4)
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one ``run()``: CPU time on CPU, events around several on CUDA."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(_PASSES):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / _PASSES
