"""`bd3 bench draws`: variance of a run's gradient per FLOP, by how the noise of a row is drawn."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bd3_common.errors import ConfigError
from bd3_common.text import counted
from bd3_megatron.config import WHOLE_INTERVAL, DiffusionConfig
from bd3_megatron.cost import flops
from bd3_megatron.diffusion.noise import SampleKeys
from bd3_megatron.engine.megatron import MegatronEngine
from data_prep.read.stream import RowStream
from pretrain.bench.options import SCATTER_GROUPS, DrawsOptions
from pretrain.checkpoint.loaded_run import LoadedRun, load_chosen
from pretrain.config.values import validate
from pretrain.evaluation.rows import make_batch
from pretrain.run_folder.data import open_stream, order_seed

Over = Literal["noise", "rows and noise"]


@dataclass(frozen=True)
class Estimator:
    """An estimate of the gradient: the mean of ``pairs`` passes of one draw each, or one pass of K draws."""

    name: str
    diffusion: DiffusionConfig
    pairs: int = 1


class Scatter:
    """Trace of the covariance of vectors that come one by one (Welford), ``E ||g - E g||^2``, unbiased."""

    def __init__(self, size: int, device: torch.device):
        self.count, self.squares = 0, 0.0
        self.mean = torch.zeros(size, device=device)

    def add(self, vector: Tensor) -> None:
        self.count += 1
        difference = vector - self.mean
        self.mean.add_(difference, alpha=1 / self.count)
        self.squares += difference.square_().sum().item() * (self.count - 1) / self.count

    @property
    def variance(self) -> float:
        return self.squares / (self.count - 1)


def bench_draws(options: DrawsOptions) -> None:
    """Print a row per estimator: variance, FLOPs, and their product relative to as many separate pairs.

    Raises:
        ConfigError: the run has no noise to draw, or a coupling does not go with its noise.
    """
    loaded = load_chosen(options)
    config = loaded.config
    names = ("masking", "count_probabilities", "beta", "omega", "stratify")
    asked = {name: value for name in names if (value := getattr(options, name)) is not None}
    if asked.get("masking", config.diffusion.masking) != config.diffusion.masking:
        asked = WHOLE_INTERVAL | {"count_probabilities": None, "count_weights": None} | asked
    if options.count_probabilities is not None:
        asked |= {"count_weights": None}
    single = validate(DiffusionConfig, config.diffusion.model_dump() | {"draws": 1, "coupling": "independent"} | asked)
    if single.objective == "causal" or _masks_all(single):
        raise ConfigError(f"{options.run}: this objective masks all or nothing, so that no noise is drawn; use another")
    estimators = _estimators(options, single)
    data = config.data
    if options.data is not None:
        data = data.at(options.data)
    stream = open_stream(data, "train", config.model, order_seed(config))
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for over in ("noise", "rows and noise")[: 1 + options.fresh_rows]:
        found: list[tuple[dict[str, Any], Tensor]] = []
        for number, estimator in enumerate(estimators):
            run = dataclasses.replace(loaded, config=config.model_copy(update={"diffusion": estimator.diffusion}))
            with run.engine() as engine:
                found.append(_measure(options, run, engine, stream, estimator, over, options.seed + number))
        rows += [_compared(row, mean, found, options.samples) for row, mean in found]
    if options.json_:
        print(json.dumps({"step": loaded.checkpoint.step, "rows": rows}))
        return
    print(
        f"step {loaded.checkpoint.step}, {options.weights} weights, B'={single.block_size}, {_objective(single)}; "
        f"{options.samples} gradients of {counted(options.rows, 'clean row')} each"
    )
    _print(rows)


def _masks_all(diffusion: DiffusionConfig) -> bool:
    return diffusion.block_size == 1 if diffusion.masking == "counts" else diffusion.beta == 1


def _objective(diffusion: DiffusionConfig) -> str:
    if diffusion.masking == "counts":
        return "counts of given probabilities" if diffusion.count_probabilities else "uniform counts"
    return f"noise levels [{diffusion.beta:g}, {diffusion.omega:g}]"


def _estimators(options: DrawsOptions, single: DiffusionConfig) -> list[Estimator]:
    estimators = [Estimator("1 pair", single)]
    for draws in dict.fromkeys(options.draws):
        estimators.append(Estimator(f"{draws} separate pairs", single, pairs=draws))
        for coupling in dict.fromkeys(options.couplings):
            several = validate(DiffusionConfig, single.model_dump() | {"draws": draws, "coupling": coupling})
            estimators.append(Estimator(f"{draws} draws, {coupling}", several))
    return estimators


def _measure(
    options: DrawsOptions,
    run: LoadedRun,
    engine: MegatronEngine,
    stream: RowStream,
    estimator: Estimator,
    over: Over,
    seed: int,
) -> tuple[dict[str, Any], Tensor]:
    """Variance and cost of one estimator's gradients, and their mean."""
    module, device = engine.module.eval(), engine.world.device
    size = sum(parameter.numel() for parameter in module.parameters())
    whole, groups, group = Scatter(size, device), [], -1
    seconds, losses = 0.0, []
    for sample in range(options.samples):
        if sample * SCATTER_GROUPS // options.samples > group:
            group += 1
            part = Scatter(size, device)
        start = _clock(device)
        keys = _keys(options, stream, estimator, over, sample)
        gradient, loss = _gradient(options, run, engine, stream, keys, seed)
        seconds += _clock(device) - start
        losses.append(loss)
        whole.add(gradient)
        part.add(gradient)
        if (sample + 1) * SCATTER_GROUPS // options.samples > group:
            groups.append(part.variance)
    model = run.config.model
    tokens = options.rows * estimator.pairs * model.length
    row = {
        "over": over,
        "estimator": estimator.name,
        "draws": estimator.diffusion.draws * estimator.pairs,
        "separate": estimator.diffusion.draws == 1,
        "variance": whole.variance,
        "variance_stderr": float(np.std(groups, ddof=1)) / math.sqrt(SCATTER_GROUPS),
        "loss_variance": float(np.var(losses, ddof=1)),
        "flops": tokens * flops.training_flops_per_token(model, estimator.diffusion),
        "seconds": seconds / options.samples,
    }
    return row, whole.mean


def _keys(options: DrawsOptions, stream: RowStream, estimator: Estimator, over: Over, sample: int) -> list[SampleKeys]:
    """The global batches whose mean is one gradient.

    Over the noise alone every pass has the same rows and is a global batch of its own. Over rows and noise separate
    pairs are what they are in training: as many other rows, in one global batch.
    """
    if over == "noise":
        slots = np.arange(options.rows)
        _, rows = stream.at(slots)
        passes = range(sample * estimator.pairs, (sample + 1) * estimator.pairs)
        return [SampleKeys(np.full(len(rows), number), rows, slots, number, len(rows)) for number in passes]
    slots = np.arange(options.rows * estimator.pairs)
    epochs, rows = stream.at(sample * len(slots) + slots)
    return [SampleKeys(epochs, rows, slots, sample, len(slots))]


def _gradient(
    options: DrawsOptions,
    run: LoadedRun,
    engine: MegatronEngine,
    stream: RowStream,
    batches: list[SampleKeys],
    seed: int,
) -> tuple[Tensor, float]:
    """Gradient of the mean training loss, all parameters in one fp32 vector; and that loss."""
    config, module = run.config, engine.module
    micro = options.micro_batch or config.train.micro_batch
    module.zero_grad(set_to_none=True)
    total = 0.0
    for keys in batches:
        for start in range(0, len(keys.rows), micro):
            part = keys.part(slice(start, start + micro))
            documents = config.data.document_mask
            batch = make_batch(stream, config.model, config.diffusion, part, seed, document_mask=documents)
            share = len(part.rows) / len(keys.rows) / len(batches)
            loss = module(batch.to(engine.world.device)).sum() * (share / batch.tokens)
            loss.backward()
            total += loss.item()
    gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters())
    return torch.cat([gradient.float().flatten() for gradient in gradients]), total


def _compared(
    row: dict[str, Any], mean: Tensor, found: list[tuple[dict[str, Any], Tensor]], samples: int
) -> dict[str, Any]:
    """The row with its cost times variance relative to separate pairs, as many of them if they were measured.

    ``mean_distance`` is the squared distance of the two mean gradients by what chance allows: 1 is expected of
    unbiased estimators, much more says that one is biased.
    """
    pairs = [(other, at) for other, at in found if other["separate"]]
    base, base_mean = next((pair for pair in pairs if pair[0]["draws"] == row["draws"] > 1), pairs[1])
    product = row["variance"] * row["flops"] / (base["variance"] * base["flops"])
    errors = [other["variance_stderr"] / other["variance"] for other in (row, base)]
    same = row is base
    chance = (row["variance"] + base["variance"]) / samples
    return row | {
        "relative": product,
        "relative_stderr": 0.0 if same else product * math.hypot(*errors),
        "relative_seconds": row["seconds"] / base["seconds"],
        "mean_distance": None if same else (mean - base_mean).square().sum().item() / chance,
    }


def _clock(device: torch.device) -> float:
    """Seconds: CPU time on CPU, wall time on CUDA."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _print(rows: list[dict[str, Any]]) -> None:
    over = None
    for row in rows:
        if row["over"] != over:
            over = row["over"]
            print(f"\nvariance over {over}")
            print(
                f"{'':<26}{'variance':>12}{'+-':>10}{'of the loss':>13}{'GFLOP':>9}{'seconds':>9}"
                f"{'var x FLOP':>12}{'+-':>8}"
            )
        print(
            f"{row['estimator']:<26}{row['variance']:>12.4g}{row['variance_stderr']:>10.2g}"
            f"{row['loss_variance']:>13.4g}{row['flops'] / 1e9:>9.3g}"
            f"{row['seconds']:>9.3f}{row['relative']:>12.3f}{row['relative_stderr']:>8.3f}"
        )
