"""The resolved configuration of a run: the model's sections, data, training, evaluation and checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from bd3_common.errors import ConfigError
from bd3_common.registry import Choice
from bd3_common.text import has_token, redacted
from bd3_megatron.attention.backends import Demand, check_backend
from bd3_megatron.config import (
    MAX_ROWS,
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
    absent,
    divisors,
)
from bd3_megatron.layers.fp8 import check_fp8
from bd3_megatron.layout import check_layout

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def _checked_path(path: str, key: str) -> str:
    """A path or URL that can be written into files of the run."""
    if not path or "\0" in path:
        raise ValueError(f"{key}={path}: {'has a NUL character' if path else 'empty'}; give a folder")
    if has_token(path):
        raise ValueError(
            f"{key}={redacted(path)}: has a password or token, which files of the run would keep; put it where fsspec "
            "looks for it: the environment, or ~/.config/fsspec"
        )
    return path


class DataConfig(Section):
    """Training data and its order."""

    path: str | None = Field(
        default=None, description="data set: a folder that bd3 prep wrote, or its URL (s3://bucket/data)"
    )
    mix: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="mixture of data sets instead of data.path: paths with their sampling weights"
    )
    seed: Seed | None = Field(default=None, description="seed of the shuffle; null means train.seed")
    order: Literal["global", "lanes"] = Field(
        default="global",
        description="shuffle over all rows (global), or over a few shards at a time, for object stores (lanes)",
    )
    lanes: int = Field(default=64, ge=1, description="shards that all ranks read at a time with data.order=lanes")
    cache: str | None = Field(
        default=None, description="local cache for shards of URLs; null means $BD3_CACHE or ~/.cache/bd3-megatron"
    )
    cache_gb: float = Field(default=100.0, gt=0, le=1e9, description="size limit of the cache in GB (1e9 bytes)")
    verify_gb: float = Field(
        default=4.0,
        ge=0,
        le=1e9,
        description="verify sha256 of local shards at the start if each rank has at most so many GB (1e9 bytes); "
        "shards of URLs are always verified",
    )
    document_mask: bool = Field(default=False, description="mask attention between documents packed in one row")

    @field_validator("path", "cache")
    @classmethod
    def _place(cls, value: str | None, info: ValidationInfo) -> str | None:
        return value if value is None else _checked_path(value, f"data.{info.field_name}")

    @field_validator("mix")
    @classmethod
    def _places(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        return value if value is None else {_checked_path(path, "data.mix"): weight for path, weight in value.items()}

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.mix is not None and self.path is not None:
            raise ValueError(f"data.mix: data.path={self.path} is given too; set one of them to null")
        if self.mix is not None and not self.mix:
            raise ValueError("data.mix: empty; give paths with their weights, or null")
        return self

    def at(self, path: str) -> DataConfig:
        """The same choices for another data set."""
        return self.model_copy(update={"path": path, "mix": None})

    def weights(self) -> dict[str, float]:
        """Weight of each data set by path, in order; empty if none is given."""
        return self.mix or ({} if self.path is None else {self.path: 1.0})


class TrainConfig(OptimizationConfig):
    """Optimization. The defaults are the paper's recipe, with the batch of one machine."""

    steps: int = Field(default=1000, ge=1, description="optimizer steps of the run; learning rate decay ends here")
    global_batch: int = Field(default=512, ge=1, le=MAX_ROWS, description="rows per optimizer step over all ranks")
    micro_batch: int = Field(default=8, ge=1, le=MAX_ROWS, description="rows per forward pass on one rank")
    seed: Seed = Field(default=0, description="seed of initial weights, noise and dropout")
    lr: float = Field(default=3e-4, gt=0, description="peak learning rate")
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the end of cosine or linear decay")
    decay: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="learning rate schedule after warm-up"
    )
    warmup_steps: int = Field(default=2500, ge=0, description="steps of linear learning rate warm-up")

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


RESUMABLE = ("train.lr", "train.min_lr", "train.decay", "train.warmup_steps", "train.steps")
"""keys that decide weights and may yet change when a run resumes, if ``resume.allow`` names them"""


class ResumeConfig(Section):
    """Going on with a run in its folder. All that decides its weights must be as it was, but for what is named here."""

    allow: tuple[str, ...] = Field(
        default=(),
        description=f"keys that may differ from the run in the folder: any of {' '.join(RESUMABLE)}; "
        "train.steps may always if the learning rate does not decay",
        json_schema_extra=absent(()),
    )

    @field_validator("allow")
    @classmethod
    def _known(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        named = tuple(name.removeprefix("--").replace("-", "_") for name in allow)
        for name, key in zip(allow, named):
            if key not in RESUMABLE:
                raise ValueError(f"resume.allow={name}: may not change in a run; use any of {', '.join(RESUMABLE)}")
        return named


EstimatorName = Literal["counts", "levels", "exact"]
ESTIMATORS_HELP = (
    "counts: draw how many tokens of a block are masked; levels: draw noise levels, which is many times noisier; "
    "exact: every mask of a block once, for small blocks"
)


class EvalConfig(Section):
    """Evaluation of the NELBO on the validation split, on the full interval of noise levels."""

    every: int = Field(default=1000, ge=0, description="steps between evaluations; 0: only at the start and the end")
    estimator: EstimatorName = Field(default="counts", description=ESTIMATORS_HELP, json_schema_extra=absent("levels"))
    rows: int | None = Field(default=None, ge=2, description="number of validation rows; null means all")
    draws: int = Field(default=1, ge=1, le=10_000, description="noise draws per row, of counts and levels")
    micro_batch: int | None = Field(
        default=None, ge=1, le=MAX_ROWS, description="rows per forward pass; null means train.micro_batch"
    )
    seed: Seed = Field(default=0, description="seed of the noise, the same at every evaluation")


def _interval(value: object) -> object:
    """``0.3:0.8`` as a pair of numbers; other values are left to the type."""
    low, colon, high = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not colon:
        return value
    try:
        return float(low), float(high)
    except ValueError:
        raise ValueError(f"{value}: not an interval; write LOWEST:HIGHEST as in 0.3:0.8") from None


class ClipSearchConfig(Section):
    """Search for the clip interval of noise levels with the least variance of the loss, while the run trains.

    The interval that it finds replaces diffusion.beta and diffusion.omega from then on, and is in the checkpoints.
    """

    every: int = Field(
        default=0, ge=0, description="steps between searches; 0: none (the paper: 5000)", json_schema_extra=absent(0)
    )
    rows: int = Field(
        default=256, ge=16, le=MAX_ROWS, description="validation rows of a search", json_schema_extra=absent(256)
    )
    estimator: Literal["counts", "direct"] = Field(
        default="counts",
        description="counts: one pass for all intervals; direct: one pass for each, as the paper does, for checking",
        json_schema_extra=absent("counts"),
    )
    grid: tuple[Annotated[tuple[float, float], BeforeValidator(_interval)], ...] | None = Field(
        default=None,
        min_length=1,
        description="intervals of levels, 0.3:0.8 0.5:1; null: [0.001, 1] and widths .5 to .9 in steps of .05",
        json_schema_extra=absent(None),
    )
    significance: float = Field(
        default=2.0,
        ge=0,
        description="standard errors by which an interval must be better to replace the present one",
        json_schema_extra=absent(2.0),
    )
    seed: Seed = Field(default=0, description="seed of the noise", json_schema_extra=absent(0))

    @field_validator("grid")
    @classmethod
    def _intervals(cls, grid: tuple[tuple[float, float], ...] | None) -> tuple[tuple[float, float], ...] | None:
        for low, high in grid or ():
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"clip_search.grid: [{low:g}, {high:g}] is no interval of levels in (0, 1]; correct it"
                )
        return grid


class CheckpointConfig(Section):
    """Checkpoints: how often, and which to keep."""

    every: int = Field(default=1000, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(default=2, ge=1, description="number of newest checkpoints to keep")
    keep_every: int = Field(
        default=0, ge=0, description="also keep every checkpoint whose step is a multiple of this; 0: none"
    )
    asynchronous: bool = Field(default=True, description="write checkpoints in the background while training goes on")


class GuardConfig(Section):
    """Non-finite losses and loss spikes: when to skip batches, roll back, or end the run."""

    nonfinite: int = Field(
        default=3,
        ge=1,
        description="end the run after this many steps with a non-finite loss or gradient within guard.window",
    )
    window: int = Field(default=1000, ge=1, description="steps over which non-finite steps are counted")
    skip: tuple[str, ...] = Field(default=(), description="steps whose batches are skipped: 120-170 300")
    spike: float | None = Field(
        default=None,
        gt=0,
        description="threshold of a loss spike, in robust standard deviations (1.4826 times the median absolute "
        "deviation) above the median of the last losses; null: no detection",
    )
    spike_window: int = Field(default=100, ge=2, description="number of last losses for median and deviation")
    spike_patience: int = Field(
        default=3, ge=1, description="steps in a row above the threshold that make a loss spike"
    )
    spike_before: int = Field(default=0, ge=0, description="steps before the spike that are skipped, too")
    spike_after: int = Field(default=50, ge=0, description="steps after the spike that are skipped, too")
    spike_limit: int = Field(default=3, ge=0, description="rollbacks allowed; one more loss spike ends the run")

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
        found = map(_RANGE.fullmatch, self.skip)
        return [(int(match[1]), int(match[2] or match[1])) for match in found if match is not None]


class LogConfig(Section):
    """Progress and metrics."""

    every: int = Field(default=10, ge=1, description="steps between progress lines when the output is not a terminal")
    tensorboard: bool = Field(default=True, description="TensorBoard scalars in the run folder")
    sinks: tuple[Annotated[str, Choice("pretrain.tracking.sinks:METRIC_SINKS")], ...] = Field(
        default=(),
        description="further places for metrics; jsonl, the record of the run, is always written",
        json_schema_extra=absent(()),
    )
    blocks_every: int = Field(
        default=10,
        ge=0,
        description="steps between records of the variance of the block loss, the masked fraction, the nll by number "
        "of masked tokens and the estimate of the likelihood bound that follows from it; 0: none",
        json_schema_extra=absent(0),
    )
    noise_scale_every: int = Field(
        default=0,
        ge=0,
        description="steps between measurements of the gradient noise scale, each with a gradient of half a batch; "
        "0: none",
        json_schema_extra=absent(0),
    )
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="peak TFLOP/s of the device, for MFU; null: from a table of GPUs, or measured by a matmul on CPU",
    )

    def sink_names(self) -> tuple[str, ...]:
        """Names of all metric sinks besides ``jsonl``."""
        return (("tensorboard",) if self.tensorboard else ()) + self.sinks


class ProfileConfig(Section):
    """Profiler: traces of time and memory of some steps. It changes no result."""

    start: int | None = Field(
        default=None,
        ge=0,
        description="first step to trace, into profile/ of the run folder; 0 (or --profile alone): the third step "
        "after a start or resume; null: no trace",
    )
    steps: int = Field(default=3, ge=1, description="number of steps to trace")
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0,), min_length=1, description="ranks that write a trace"
    )
    shapes: bool = Field(default=False, description="record the shapes of operands")
    memory: bool = Field(default=False, description="record memory allocations")
    memory_history: int = Field(
        default=0,
        ge=0,
        description="CUDA allocations whose stacks the out-of-memory snapshot has; 0: it has the allocations alone",
    )


class PreflightConfig(Section):
    """Checks of all nodes before the first step, at every start. They change no result."""

    enabled: bool = Field(default=True, description="run the checks of nodes, links, folders and data")
    strict: bool = Field(
        default=False,
        description="slow ranks and links, wrong clocks and occupied GPUs end the run with exit code 76 and are in "
        "suspects.json; false: a warning",
    )
    slowest: float = Field(
        default=0.7,
        gt=0,
        lt=1,
        description="a matmul or link rate below this fraction of the median over ranks is slow",
    )
    free_gpu_memory: float = Field(default=0.9, ge=0, le=1, description="fraction of a GPU's memory that must be free")
    clock_skew: float = Field(
        default=5.0, gt=0, description="largest allowed difference between the clocks of two nodes, in seconds"
    )


class RunConfig(Section):
    """Everything that defines a training run."""

    run: str = Field(default="runs/default", description="run folder")
    init: str | None = Field(
        default=None,
        description="run folder (RUN or RUN@STEP) or Hugging Face folder whose weights a new run begins with; "
        "the shape of the model is then its",
        json_schema_extra=absent(None),
    )
    init_weights: Literal["ema", "raw"] = Field(
        default="ema",
        description="of a run that init names: its EMA weights, or the last step's",
        json_schema_extra=absent("ema"),
    )
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    kernels: KernelConfig = KernelConfig()
    fp8: Fp8Config = Fp8Config()
    parallel: ParallelConfig = ParallelConfig()
    zero: ZeroConfig = ZeroConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    resume: ResumeConfig = ResumeConfig()
    eval: EvalConfig = EvalConfig()
    clip_search: ClipSearchConfig = ClipSearchConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()
    preflight: PreflightConfig = PreflightConfig()

    @field_validator("run")
    @classmethod
    def _run(cls, value: str) -> str:
        return _checked_path(value, "run")

    def engine(self) -> EngineConfig:
        """The sections that an engine is built from."""
        shared = EngineConfig.model_fields.keys() & RunConfig.model_fields.keys()
        return EngineConfig(optimization=self.train, **{name: getattr(self, name) for name in shared})


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
    _check_search(config.clip_search, config.diffusion)
    from bd3_megatron.diffusion.estimators import LikelihoodEstimator  # numpy: not for --help

    try:
        LikelihoodEstimator(config.diffusion, config.eval.estimator)
    except ConfigError as error:
        raise ConfigError(f"eval.{error}") from None
    return data_size


def _check_search(search: ClipSearchConfig, diffusion: DiffusionConfig) -> None:
    if search.every and (diffusion.masking == "counts" or diffusion.objective == "causal"):
        key = "masking=counts" if diffusion.masking == "counts" else "objective=causal"
        raise ConfigError(
            f"clip_search.every={search.every}: diffusion.{key} draws no noise levels, so no interval to search for; "
            f"use 0, or diffusion.masking=levels"
        )
    if search.every and diffusion.coupling == "complementary" and diffusion.resample:
        raise ConfigError(
            f"clip_search.every={search.every}: diffusion.resample=true with diffusion.coupling=complementary needs an "
            f"interval whose middle is .5, which a search may leave; use 0, or diffusion.coupling=antithetic"
        )
    for low, high in search.grid or () if search.every else ():
        try:
            DiffusionConfig.model_validate(diffusion.model_dump() | {"beta": low, "omega": high})
        except ValidationError as error:
            reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ").partition(";")[0]
            raise ConfigError(f"clip_search.grid=[{low:g}, {high:g}]: {reason}; leave it out") from None


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
