"""The resolved configuration of a run: the model's sections, data, training, evaluation and checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bd3_common.errors import ConfigError
from bd3_common.registry import Choice
from bd3_megatron.attention.backends import Demand, check_backend
from bd3_megatron.config import (
    DiffusionConfig,
    EngineConfig,
    Fp8Config,
    KernelConfig,
    ModelConfig,
    OptimizationConfig,
    ParallelConfig,
    Section,
    Seed,
    ZeroConfig,
    divisors,
)
from bd3_megatron.layers.fp8 import check_fp8
from bd3_megatron.layout import check_layout

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


class DataConfig(Section):
    """Where the rows come from and in which order."""

    path: str | None = Field(None, description="folder that bd3 prep wrote, or the URL of a copy (s3://bucket/data)")
    mix: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="several of them with their weights, instead of data.path"
    )
    seed: Seed | None = Field(None, description="seed of the row order; null means train.seed")
    order: Literal["global", "lanes"] = Field(
        "global", description="global permutes all rows; lanes reads few shards at a time, for object stores"
    )
    lanes: int = Field(64, ge=1, description="shards read at a time over all ranks with data.order=lanes")
    cache: str | None = Field(
        None, description="folder for the shards of URLs; null means $BD3_CACHE or ~/.cache/bd3-megatron"
    )
    cache_gb: float = Field(100.0, gt=0, description="most that the cache holds, in GB (1e9 bytes)")
    verify_gb: float = Field(
        4.0,
        ge=0,
        description="local shards are compared with their sha256 at the start if that is at most so much per rank "
        "(GB of 1e9 bytes); shards of URLs always are",
    )
    document_mask: bool = Field(False, description="attention keeps to the documents that are packed in a row")

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.mix is not None and self.path is not None:
            raise ValueError(f"data.mix: data.path={self.path} is given too; set one of them to null")
        if self.mix is not None and not self.mix:
            raise ValueError("data.mix: empty; give paths with their weights, or null")
        return self

    def weights(self) -> dict[str, float]:
        """Weight of each data set by path, in order; empty if none is given."""
        return self.mix or ({} if self.path is None else {self.path: 1.0})


class TrainConfig(OptimizationConfig):
    """Optimization. The defaults are the paper's recipe, with the batch of one machine."""

    steps: int = Field(1000, ge=1, description="optimizer steps in all; a decaying learning rate ends here")
    global_batch: int = Field(512, ge=1, description="rows per optimizer step over all ranks")
    micro_batch: int = Field(8, ge=1, description="rows per forward pass on one rank")
    seed: Seed = Field(0, description="seed of weights, noise and dropout")
    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the last step of cosine and linear decay")
    decay: Literal["constant", "cosine", "linear"] = Field("constant", description="learning rate after warm-up")
    warmup_steps: int = Field(2500, ge=0, description="steps of linear warm-up")

    @model_validator(mode="after")
    def _batches(self) -> TrainConfig:
        if self.global_batch % self.micro_batch:
            fitting = divisors(self.global_batch, self.micro_batch)[-1]
            raise ValueError(
                f"train.micro_batch={self.micro_batch}: train.global_batch={self.global_batch} is not "
                f"divisible by {self.micro_batch}; use {fitting}"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"train.min_lr={self.min_lr:g}: above train.lr={self.lr:g}; lower it")
        return self


class EvalConfig(Section):
    """Evaluation of the NELBO on the validation split, on the full interval of noise levels."""

    every: int = Field(1000, ge=0, description="steps between evaluations; 0 evaluates at the start and the end only")
    rows: int | None = Field(None, ge=2, description="first rows of the validation order used; null means all")
    draws: int = Field(1, ge=1, description="noise draws per row")
    micro_batch: int | None = Field(None, ge=1, description="rows per forward pass; null means train.micro_batch")
    seed: Seed = Field(0, description="seed of the evaluation noise, the same at every evaluation")


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: int = Field(1000, ge=0, description="steps between checkpoints; 0 writes the last one only")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_every: int = Field(0, ge=0, description="checkpoints of every so many steps are kept for ever; 0: none")
    asynchronous: bool = Field(True, description="write while training goes on")


class GuardConfig(Section):
    """What happens to steps that go wrong: a loss that is not finite, and a loss that jumps."""

    nonfinite: int = Field(
        3, ge=1, description="so many steps without a finite loss and gradient within guard.window end the run"
    )
    window: int = Field(1000, ge=1, description="steps over which they are counted")
    skip: tuple[str, ...] = Field((), description="steps whose batches are left out, as in 120-170 300")
    spike: float | None = Field(
        None,
        gt=0,
        description="robust standard deviations (1.4826 times the median absolute deviation) above the median of the "
        "last losses at which a loss counts as a spike; null: spikes are not looked for",
    )
    spike_window: int = Field(100, ge=2, description="losses that median and deviation are taken of")
    spike_patience: int = Field(3, ge=1, description="steps in a row that must be so high")
    spike_before: int = Field(0, ge=0, description="steps before the first of them that are left out too")
    spike_after: int = Field(50, ge=0, description="steps after the last of them that are left out too")
    spike_limit: int = Field(3, ge=0, description="times that a run goes back; after so many a spike ends it")

    @model_validator(mode="after")
    def _ranges(self) -> GuardConfig:
        for text in self.skip:
            found = _RANGE.fullmatch(text)
            if found is None or not 1 <= int(found[1]) <= int(found[2] or found[1]):
                raise ValueError(
                    f"guard.skip={text}: not a range of steps; write FIRST-LAST as in 120-170, or one step"
                )
        return self

    def ranges(self) -> list[tuple[int, int]]:
        """First and last step of each range of ``skip``."""
        found = [_RANGE.fullmatch(text) for text in self.skip]
        return [(int(match[1]), int(match[2] or match[1])) for match in found]


class LogConfig(Section):
    """What is written while training."""

    every: int = Field(10, ge=1, description="steps between progress lines where there is no terminal")
    tensorboard: bool = Field(default=True, description="TensorBoard scalars in the run folder")
    sinks: tuple[Annotated[str, Choice("pretrain.tracking.sinks:METRIC_SINKS")], ...] = Field(
        default=(), description="further places for metrics; jsonl, the record of the run, is always written"
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="the device's peak for MFU; null looks the GPU up, or measures a matmul on CPU",
    )

    def sink_names(self) -> tuple[str, ...]:
        """Names of all metric sinks besides ``jsonl``."""
        return (("tensorboard",) if self.tensorboard else ()) + self.sinks


class ProfileConfig(Section):
    """Where time and memory of a step go. Nothing here changes what is computed."""

    start: int | None = Field(
        None,
        ge=0,
        description="first step of a trace into the run folder's profile/; 0 (or --profile alone): the third step "
        "after the run starts or goes on; null: none",
    )
    steps: int = Field(3, ge=1, description="steps traced")
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1, description="ranks that write a trace")
    shapes: bool = Field(False, description="the trace names the shapes of operands")
    memory: bool = Field(False, description="the trace shows allocations")
    memory_history: int = Field(
        0,
        ge=0,
        description="newest allocations whose stacks are kept on CUDA for the snapshot that is written when memory "
        "runs out; 0 keeps none: the snapshot shows what is allocated, not by whom",
    )


class PreflightConfig(Section):
    """What is checked on all nodes before the first step, at every start. Nothing here changes what is computed."""

    enabled: bool = Field(True, description="check the nodes, their links, the folders and the data")
    strict: bool = Field(
        False,
        description="slow ranks and links, wrong clocks and occupied GPUs end the run with exit code 76 and are "
        "named in suspects.json, instead of a warning",
    )
    slowest: float = Field(
        0.7, gt=0, lt=1, description="part of the median over ranks below which a rate of matmuls or of a link is slow"
    )
    free_gpu_memory: float = Field(0.9, ge=0, le=1, description="part of a GPU's memory that must be free")
    clock_skew: float = Field(5.0, gt=0, description="seconds that the clocks of two nodes may differ")


class RunConfig(Section):
    """Everything that defines a training run."""

    run: str = Field("runs/default", description="run folder")
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    kernels: KernelConfig = KernelConfig()
    fp8: Fp8Config = Fp8Config()
    parallel: ParallelConfig = ParallelConfig()
    zero: ZeroConfig = ZeroConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()
    preflight: PreflightConfig = PreflightConfig()

    def engine(self) -> EngineConfig:
        """The sections that an engine is built from."""
        return EngineConfig(
            model=self.model,
            diffusion=self.diffusion,
            kernels=self.kernels,
            fp8=self.fp8,
            parallel=self.parallel,
            zero=self.zero,
            optimization=self.train,
        )


def check_run(config: RunConfig, world_size: int) -> int:
    """Check what the configuration alone decides for so many processes; the data-parallel size.

    Raises:
        ConfigError: one line with the key, its value and what would fit.
    """
    engine = config.engine()
    data_size = check_layout(engine, world_size)
    check_backend(config.kernels.attention, Demand.of(engine))
    check_fp8(engine)
    _check_guard(config.guard, config.checkpoint)
    return data_size


def _check_guard(guard: GuardConfig, checkpoint: CheckpointConfig) -> None:
    """A spike is known at its last step: a checkpoint from before its first one must be there still."""
    back = guard.spike_patience - 1 + guard.spike_before
    if guard.spike is not None and checkpoint.every and (checkpoint.keep - 1) * checkpoint.every < back:
        raise ConfigError(
            f"checkpoint.keep={checkpoint.keep}: with one every {checkpoint.every} steps none may be left from {back} "
            f"steps ago, before a spike of guard.spike_patience={guard.spike_patience} steps; "
            f"use {1 - (-back // checkpoint.every)} or more"
        )


def check_batches(train: TrainConfig, parallel: ParallelConfig, data_size: int) -> None:
    """Check that ``data_size`` data-parallel ranks share a global batch in whole micro-batches.

    Raises:
        ConfigError: one line with the value and what would fit.
    """
    # The interleaved schedule hands micro-batches on in groups as large as the pipeline.
    unit = train.micro_batch * data_size * (parallel.pipeline if parallel.interleave > 1 else 1)
    if train.global_batch % unit:
        groups = f" and parallel.pipeline={parallel.pipeline} interleaved stages" if parallel.interleave > 1 else ""
        raise ConfigError(
            f"train.global_batch={train.global_batch}: not a multiple of train.micro_batch={train.micro_batch} times "
            f"{data_size} data-parallel ranks{groups}; use a multiple of {unit}"
        )


def check_profile(profile: ProfileConfig, world_size: int) -> None:
    """Check that the ranks that are to write a trace exist.

    Raises:
        ConfigError: one line with the ranks that do.
    """
    absent = [rank for rank in profile.ranks if rank >= world_size]
    if profile.start is not None and absent:
        named = " ".join(map(str, profile.ranks))
        raise ConfigError(
            f"profile.ranks={named}: there is no rank {absent[0]} among {world_size}; use 0"
            + (f" to {world_size - 1}" if world_size > 1 else "")
        )
