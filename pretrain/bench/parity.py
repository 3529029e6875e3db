"""`bd3 bench parity`: every layout against one process.

Each layout trains the same tiny model on the same rows in real processes, in fp32. The comparison covers the first
step's loss and every gathered gradient, losses and weights after all steps, the evaluation under EMA weights, and the
noise of every sample, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from bd3_common.errors import ConfigError
from bd3_common.text import counted
from bd3_megatron import parallel
from bd3_megatron.attention.mask import Streams
from bd3_megatron.backbones import BACKBONES
from bd3_megatron.config import (
    DiffusionConfig,
    Fp8Config,
    KernelConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
)
from bd3_megatron.diffusion.batches import Batch, causal_batch, diffusion_batch
from bd3_megatron.diffusion.noise import SampleKeys, draw_noise
from bd3_megatron.engine import build_engine
from bd3_megatron.engine.base import Engine
from bd3_megatron.hf.mapping import entries
from bd3_megatron.layout import check_layout
from bd3_megatron.shards import Chunk, ShardedTensor
from pretrain.bench.layouts import LAYOUTS, Layout
from pretrain.bench.options import ParityOptions
from pretrain.config.schema import TrainConfig, check_batches
from pretrain.config.values import did_you_mean, validate
from pretrain.distributed.spawn import FORKS, TIMEOUT, run_world

FIRST_STEP, ALL_STEPS = 1e-5, 1e-4  # largest relative difference allowed
BETA1, CLIP_NORM = 0.9, 0.5


class Task(NamedTuple):
    """Training that every layout runs; ``documents``: rows hold several, and attention is limited to each."""

    model: ModelConfig
    diffusion: DiffusionConfig
    global_batch: int = 8
    micro_batch: int = 2
    steps: int = 10
    precision: Literal["fp32", "bf16"] = "fp32"
    documents: bool = False
    kernels: KernelConfig = KernelConfig()
    fp8: Fp8Config = Fp8Config()


@dataclass(frozen=True)
class Outcome:
    """Results of one training, the same on every rank unless stated.

    Attributes:
        losses, norms: of every step.
        gradients: of the first step, whole tensors by global name.
        state: weights, moments and EMA after the last step, whole tensors.
        nll: weighted nll of this rank's rows under EMA weights.
        noise: digest of levels and masks by sample ``(step, slot)``, of this rank's samples.
    """

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    nll: torch.Tensor
    noise: dict[tuple[int, int], str]


@dataclass(frozen=True)
class Difference:
    """Largest relative differences between a layout and one process.

    Attributes:
        loss: of the first step; ``gradient``: of the first step, per tensor relative to its largest element.
        norm: of the first gradient norm.
        steps: of losses and weights over all steps; ``evaluation``: of the rows' nll after them.
        same_noise: True if every sample had the same noise, bit for bit.
    """

    loss: float
    gradient: float
    norm: float
    steps: float
    evaluation: float
    same_noise: bool

    @property
    def passes(self) -> bool:
        first = max(self.loss, self.gradient, self.norm)
        return first <= FIRST_STEP and max(self.steps, self.evaluation) <= ALL_STEPS and self.same_noise


def train(rank: int, size: int, store: dist.Store, runs: list[tuple[str, Layout, Task]]) -> list[Outcome]:
    """Train each of the named ``runs`` on this rank, one after the other in the same processes."""
    outcomes = []
    for name, layout, task in runs:
        world = parallel.start(layout.parallel, rank, size, rank, dist.PrefixStore(name, store))
        try:
            outcomes.append(_train(world, layout, task))
        finally:
            parallel.stop()
    return outcomes


def make_engine(world: parallel.World, layout: Layout, task: Task) -> Engine:
    """The engine of a layout. Adam's epsilon is larger than usual: where a gradient is rounding error, its sign differs
    between layouts, and Adam would scale it up."""
    optimization = OptimizationConfig(
        precision=task.precision, clip_norm=CLIP_NORM, ema_decay=0.9, beta1=BETA1, weight_decay=0.1, adam_eps=1e-4
    )
    engine = build_engine(layout.config(task).replace(optimization=optimization), world)
    engine.set_weights(_weights(task.model))
    return engine


def _weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Random weights by global name. Initial weights would hide errors: where a head or a bias starts at zero, most
    gradients are zero in every layout."""
    generator = torch.Generator().manual_seed(3)
    drawn = {
        entry.name: torch.randn(entry.shape, generator=generator)
        for entry in sorted(entries(model), key=lambda e: e.name)
    }
    return {name: 0.2 * x + name.endswith("norm.weight") for name, x in drawn.items()}


def batches(
    world: parallel.World, task: Task, step: int, noise: dict[tuple[int, int], str] | None = None
) -> list[Batch]:
    """This data-parallel rank's micro-batches of random rows; digests of their noise go to ``noise``."""
    model, count = task.model, task.global_batch
    rows = np.random.default_rng(step).integers(0, model.mask_id, (count, model.length))
    # About four documents a row, the blocks they begin in included; drawn apart, so that the rows are the same.
    starts = np.random.default_rng([step, 1]).random(rows.shape) < 4 / model.length
    documents = starts.cumsum(1) if task.documents else None
    share = count // world.data_size
    made = []
    for start in range(world.data_rank * share, (world.data_rank + 1) * share, task.micro_batch):
        slots = np.arange(start, start + task.micro_batch)
        packed = None if documents is None else documents[slots]
        if task.diffusion.objective == "causal":
            made.append(causal_batch(rows[slots], packed))
            continue
        drawn = draw_noise(task.diffusion, model.length, 0, SampleKeys(np.zeros_like(slots), slots, slots, step, count))
        streams = Streams.of(task.diffusion, model.length)
        made.append(diffusion_batch(rows[slots], drawn, model.mask_id, streams, packed))
        for n, slot in enumerate(slots if noise is not None else ()):
            raw = drawn.t[:, n].tobytes() + drawn.masked[:, n].tobytes() + drawn.weight[:, n].tobytes()
            noise[step, int(slot)] = hashlib.sha256(raw).hexdigest()
    return made


def copied(state: Mapping[str, ShardedTensor], factor: float = 1.0) -> dict[str, ShardedTensor]:
    """This rank's chunks as copies on the CPU, times ``factor``."""
    return {
        name: ShardedTensor(sharded.shape, tuple(Chunk(p.offsets, p.data.cpu() * factor) for p in sharded.chunks))
        for name, sharded in state.items()
    }


def whole(parts: Iterable[Mapping[str, ShardedTensor]]) -> dict[str, torch.Tensor]:
    """Whole tensors from the chunks of all ranks; NaN where no rank has a chunk."""
    tensors: dict[str, torch.Tensor] = {}
    for name, sharded in (item for part in parts for item in part.items()):
        tensor = tensors.setdefault(name, torch.full(sharded.shape, torch.nan))
        for chunk in sharded.chunks:
            tensor[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.data.shape))] = chunk.data
    return tensors


def _train(world: parallel.World, layout: Layout, task: Task) -> Outcome:
    """The outcome with this rank's chunks in place of whole tensors."""
    engine = make_engine(world, layout, task)
    losses, norms, gradients, noise = [], [], {}, {}
    for step in range(task.steps):
        parallel.seed_dropout(0, step)
        result = engine.train_step(batches(world, task, step, noise), lr=1e-3)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if step == 0:
            # Adam's first moment after one step is (1 - beta1) times the clipped gradient.
            unclipped = max(1.0, result.grad_norm / CLIP_NORM) / (1 - BETA1)
            moments = {name: sharded for name, sharded in engine.state().items() if name.startswith("exp_avg/")}
            gradients = copied(moments, unclipped)
    with engine.averaged():
        nll = torch.cat(engine.forward(batches(world, task, task.steps)))
    return Outcome(losses, norms, gradients, copied(engine.state()), nll, noise)


def run(
    runs: Mapping[str, tuple[Layout, Task]], train: Callable[..., list[Outcome]] = train
) -> dict[str, list[Outcome]]:
    """Outcomes on every rank by the run's name; the processes of a world size start once.

    Args:
        train: function that each process runs, with the arguments of :func:`train`.
    """
    found = {}
    for size in sorted({layout.size for layout, _ in runs.values()}):
        names = [name for name, (layout, _) in runs.items() if layout.size == size]
        by_rank = run_world(size, train, [(name, *runs[name]) for name in names], timeout=TIMEOUT * len(names))
        for i, name in enumerate(names):
            ranks = [rank[i] for rank in by_rank]
            gradients = {
                key.removeprefix("exp_avg/"): tensor for key, tensor in whole(r.gradients for r in ranks).items()
            }
            state = whole(r.state for r in ranks)
            found[name] = [replace(outcome, gradients=gradients, state=state) for outcome in ranks]
    return found


def compare(by_rank: list[Outcome], expected: Outcome) -> Difference:
    """Differences between the ranks of a layout and one process, the worst rank for each number."""
    one = by_rank[0]
    noise = [item for outcome in by_rank for item in outcome.noise.items()]
    # Ranks that share rows have equal nll; the distinct ones are the whole batch in order.
    parts = {tuple(outcome.nll.flatten().tolist()): outcome.nll for outcome in by_rank}
    nll = torch.cat(list(parts.values()))
    weights = {name: tensor for name, tensor in expected.state.items() if name.startswith(("weights/", "ema/"))}
    if not all(bool(gradient.any()) for gradient in expected.gradients.values()):
        raise ValueError("a gradient is zero throughout, so that its comparison would show nothing")
    return Difference(
        loss=max(_relative(o.losses[:1], expected.losses[:1]) for o in by_rank),
        gradient=_worst(one.gradients, expected.gradients),
        norm=max(_relative(o.norms[:1], expected.norms[:1]) for o in by_rank),
        steps=max(
            *(_relative(o.losses, expected.losses) for o in by_rank),
            *(_relative(o.norms, expected.norms) for o in by_rank),
            _worst({name: one.state.get(name) for name in weights}, weights),
        ),
        evaluation=_worst({"nll": nll}, {"nll": expected.nll}),
        same_noise=bool(noise)
        and dict(noise).keys() == expected.noise.keys()
        and set(noise) == set(expected.noise.items()),
    )


def _relative(found: Iterable[float], expected: Iterable[float]) -> float:
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found, expected, strict=True))


def _worst(found: Mapping[str, torch.Tensor | None], expected: Mapping[str, torch.Tensor]) -> float:
    """Largest difference of any tensor, relative to its largest element; infinite for another set of tensors."""
    worst = 0.0 if found.keys() == expected.keys() else float("inf")
    for name, tensor in expected.items():
        other = found.get(name)
        if other is None or other.shape != tensor.shape or not bool(other.isfinite().all()):
            return float("inf")
        worst = max(worst, float((other - tensor).abs().max() / tensor.abs().max().clamp(min=1e-12)))
    return worst


def bench_parity(options: ParityOptions) -> int:
    """Print the table of layouts and differences; 1 if one is too large."""
    names = options.layouts or tuple(LAYOUTS)
    for name in names:
        if name not in LAYOUTS:
            raise ConfigError(f"layouts={name}: unknown layout{did_you_mean(name, LAYOUTS)}; use {', '.join(LAYOUTS)}")
    task = _task(options)
    for name in names:
        _check(name, LAYOUTS[name], task)
    most = max(LAYOUTS[name].size for name in names)
    if torch.cuda.is_available() and torch.cuda.device_count() < most:
        raise ConfigError(
            f"{counted(torch.cuda.device_count(), 'GPU')}: these layouts need {most}; choose others with --layouts, or "
            f"compare on the CPU with CUDA_VISIBLE_DEVICES="
        )
    FORKS.set_forkserver_preload([__name__])
    alone = {"": (Layout(1, ParallelConfig()), task)}
    outcomes = run(alone | {name: (LAYOUTS[name], task) for name in names})
    found = {name: compare(outcomes[name], outcomes[""][0]) for name in names}
    rows = [{"layout": n, "processes": LAYOUTS[n].size, "ok": d.passes, **asdict(d)} for n, d in found.items()]
    failed = [name for name, difference in found.items() if not difference.passes]
    if options.json_:
        print(json.dumps({"rows": rows, "failed": failed}))
    else:
        _print(rows, task)
    if failed:
        print(f"differs from one process: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _task(options: ParityOptions) -> Task:
    grouped = options.heads // 2 if BACKBONES.instance(options.backbone).grouped_queries else options.heads
    model = validate(
        ModelConfig,
        {
            **{name: getattr(options, name) for name in ("backbone", "layers", "hidden", "heads", "length")},
            "kv_heads": options.kv_heads or max(1, grouped),
            "tie_embeddings": options.tie_embeddings,
            "vocab_size": options.vocab_size,
            "mask_id": options.vocab_size - 1,
        },
    )
    diffusion = validate(DiffusionConfig, {"block_size": options.block_size, "draws": options.draws})
    rows = options.global_batch, options.micro_batch, options.steps
    return Task(model, diffusion, *rows, documents=options.documents)


def _check(name: str, layout: Layout, task: Task) -> None:
    """Check a layout before any process starts.

    Raises:
        ConfigError: one line that begins with the layout's name.
    """
    try:
        data = check_layout(layout.config(task), layout.size)
    except ConfigError as error:
        raise ConfigError(f"layout {name}: {error}; or leave it out with --layouts") from None
    try:
        rows = validate(TrainConfig, {"global_batch": task.global_batch, "micro_batch": task.micro_batch})
        check_batches(rows, layout.parallel, data)
    except ConfigError as error:
        raise ConfigError(f"layout {name}: {str(error).replace('train.', '')}") from None


def _print(rows: list[dict[str, Any]], task: Task) -> None:
    model = task.model
    print(
        f"{model.backbone}, {model.layers} layers of {model.hidden}, L={model.length}, "
        f"B'={task.diffusion.block_size}, fp32, {'nccl' if torch.cuda.is_available() else 'gloo'}, {task.steps} steps; "
        f"largest relative differences"
    )
    columns = ("loss", "gradient", "norm", "steps", "evaluation")
    print(f"{'layout':<24}{'ranks':>6}" + "".join(f"{c:>12}" for c in columns) + f"{'noise':>8}")
    for row in rows:
        numbers = "".join(f"{row[c]:>12.1e}" for c in columns)
        noise = "same" if row["same_noise"] else "OTHER"
        print(f"{row['layout']:<24}{row['processes']:>6}{numbers}{noise:>8}{'' if row['ok'] else '  OFF'}")
