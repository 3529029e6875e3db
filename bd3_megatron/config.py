"""Configuration of the model, the objective and the layout: frozen pydantic models, importable without torch.

A mistake is reported as one line that names the dotted key, its value and the remedy, for example
``parallel.tensor=3: model.heads=8 is not divisible by 3; use 1, 2, 4 or 8``. Checks that need one section
only live here as validators; checks across sections are in :func:`check_layout`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bd3_common.errors import ConfigError
from bd3_common.registry import Choice
from bd3_megatron.attention.backends import ATTENTION_BACKENDS, AUTO
from bd3_megatron.backbones import BACKBONES, Backbone, Traits, get_backbone
from bd3_megatron.diffusion.schedules import SCHEDULES, get_schedule

# What Philox, torch's generators and JSON all take.
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """Base of every configuration section: immutable, finite numbers only, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def divisors(n: int, limit: int = 64) -> list[int]:
    """Divisors of ``n`` not above ``limit``, ascending."""
    return [d for d in range(1, min(n, limit) + 1) if n % d == 0]


def listing(values: list[int]) -> str:
    """``[1, 2, 4] -> "1, 2 or 4"`` for error texts."""
    words = [str(v) for v in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


class ModelConfig(Section):
    """Shape of the transformer."""

    backbone: Annotated[str, Choice(BACKBONES)] = Field(
        default="qwen3", description="family of transformers: norms, activation, biases"
    )
    layers: int = Field(12, ge=1, description="transformer layers")
    hidden: int = Field(768, ge=1, description="width of the residual stream")
    heads: int = Field(12, ge=1, description="query heads")
    kv_heads: int | None = Field(None, ge=1, description="key and value heads; null means as many as heads")
    head_dim: int | None = Field(None, ge=2, description="width of one head; null means hidden / heads")
    ffn_hidden: int | None = Field(None, ge=1, description="width between the MLP's matrices; null: the backbone's")
    length: int = Field(1024, ge=2, description="tokens per row, L")
    vocab_size: int | None = Field(None, ge=2, description="tokens incl. the mask; null means the data set's")
    mask_id: int | None = Field(None, ge=0, description="id of the mask token; null means the data set's")
    bos_id: int | None = Field(None, ge=0, description="id that begins a row; null means the data set's")
    eos_id: int | None = Field(None, ge=0, description="id that ends a document; null means the data set's")
    rope_theta: float = Field(10_000.0, gt=0)
    norm_eps: float | None = Field(None, gt=0, description="epsilon of the norms; null: the backbone's")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the two branch outputs of a layer")
    tie_embeddings: bool = Field(False, description="head shares the embedding's weight")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the initial weights")

    @model_validator(mode="after")
    def _shape(self) -> ModelConfig:
        if self.head_dim is None and self.hidden % self.heads:
            raise ValueError(
                f"model.heads={self.heads}: model.hidden={self.hidden} is not divisible by {self.heads}; "
                f"use {listing(divisors(self.hidden))}, or set model.head_dim"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(
                f"model.kv_heads={self.kv_heads}: model.heads={self.heads} is not divisible by "
                f"{self.kv_heads}; use {listing(divisors(self.heads))}"
            )
        if self.width_per_head % 2:
            raise ValueError(
                f"model.head_dim={self.width_per_head}: rotary embeddings need an even width; "
                f"change model.heads={self.heads} or set model.head_dim to an even number"
            )
        if self.tie_embeddings and not self.family.may_tie:
            raise ValueError(
                f"model.tie_embeddings=true: the {self.backbone} backbone has a head with a weight of its own; "
                f"use false or another model.backbone"
            )
        if self.groups != self.heads and not self.family.grouped_queries:
            raise ValueError(
                f"model.kv_heads={self.kv_heads}: the {self.backbone} backbone has one key head per query head; "
                f"use null or another model.backbone"
            )
        if self.vocab_size is not None and self.mask_id is not None and self.mask_id >= self.vocab_size:
            raise ValueError(
                f"model.mask_id={self.mask_id}: not below model.vocab_size={self.vocab_size}; "
                f"use {self.vocab_size - 1} or less"
            )
        return self

    @property
    def family(self) -> Backbone:
        """The backbone itself."""
        return get_backbone(self.backbone)

    @property
    def traits(self) -> Traits:
        """Traits of the backbone."""
        return self.family.traits

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    @property
    def width_per_head(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def ffn(self) -> int:
        """Width between the MLP's matrices."""
        return self.ffn_hidden or self.family.default_ffn(self.hidden)

    @property
    def eps(self) -> float:
        """Epsilon of the norms."""
        return self.norm_eps or self.family.norm_eps

    def parameters(self, vocab_size: int) -> int:
        """Parameters of the whole model with ``vocab_size`` tokens, before the vocabulary is padded."""
        return sum(math.prod(parameter.shape) for parameter in self.family.parameters(self, vocab_size))


class DiffusionConfig(Section):
    """The objective (arXiv 2503.09573). ``block_size = 1`` with ``beta = omega = 1`` is AR with an exact
    likelihood, ``block_size = model.length`` is MDLM, and ``objective = causal`` is the plain causal LM."""

    objective: Literal["diffusion", "causal"] = Field(
        "diffusion",
        description="diffusion: noisy stream predicts masked tokens; causal: shifted next-token loss",
    )
    block_size: int = Field(16, ge=1, description="tokens per block, B'")
    schedule: Annotated[str, Choice(SCHEDULES)] = Field(
        default="loglinear", description="noise schedule: mask probability by noise level t"
    )
    beta: float = Field(1e-3, gt=0, le=1, description="lower end of the interval of noise levels t")
    omega: float = Field(1.0, gt=0, le=1, description="upper end of the interval of noise levels t")
    resample: bool = Field(False, description="redraw a block's bits until its masked fraction lies in [beta, omega]")
    stratify: bool = Field(True, description="one noise level per stratum over the global batch (low variance)")
    draws: int = Field(1, ge=1, description="noisy draws per clean row, K")
    coupling: Literal["independent", "antithetic", "complementary"] = Field(
        "independent",
        description="pairs of draws: antithetic mirrors the second's noise levels, complementary its masks too",
    )

    @model_validator(mode="after")
    def _interval(self) -> DiffusionConfig:
        if self.beta > self.omega:
            raise ValueError(f"diffusion.beta={self.beta:g}: above diffusion.omega={self.omega:g}; exchange them")
        if self.resample and not self.full_interval:
            low = -(-self.beta * self.block_size // 1)  # ceil
            if low > self.omega * self.block_size:
                raise ValueError(
                    f"diffusion.beta={self.beta:g}: no k/{self.block_size} lies in "
                    f"[{self.beta:g}, {self.omega:g}], so resampling would never end; "
                    f"widen the interval or set diffusion.resample=false"
                )
        if self.objective == "causal" and (self.block_size != 1 or self.draws != 1):
            raise ValueError(
                f"diffusion.objective=causal: needs block_size=1 and draws=1, not {self.block_size} and "
                f"{self.draws}; set both to 1"
            )
        return self

    @model_validator(mode="after")
    def _pairs(self) -> DiffusionConfig:
        if self.coupling == "independent":
            return self
        if self.objective == "causal":
            raise ValueError(
                f"diffusion.coupling={self.coupling}: diffusion.objective=causal draws no noise; use independent"
            )
        if self.draws % 2:
            raise ValueError(
                f"diffusion.draws={self.draws}: diffusion.coupling={self.coupling} takes draws in pairs; "
                f"use an even number, or diffusion.coupling=independent"
            )
        if self.coupling == "complementary" and self.resample and not self.full_interval and not self._mirrored:
            raise ValueError(
                f"diffusion.resample=true: with diffusion.coupling=complementary it needs the loglinear schedule and "
                f"beta + omega = 1, not {self.schedule} and {self.beta + self.omega:g}; use "
                f"diffusion.coupling=antithetic or diffusion.resample=false"
            )
        return self

    @property
    def _mirrored(self) -> bool:
        """True if a block inside the interval has its complement inside it too, as resampling of pairs needs."""
        return get_schedule(self.schedule).linear and abs(self.beta + self.omega - 1) < 1e-9

    @property
    def full_interval(self) -> bool:
        """True for the unclipped schedule, whose draws are never redrawn (objective, step 7)."""
        return self.beta <= 1e-3 and self.omega >= 1


class KernelConfig(Section):
    """Which implementation computes what; the choices differ in cost, never in the result."""

    attention: Annotated[str, Choice(ATTENTION_BACKENDS, (AUTO,))] = Field(
        default=AUTO, description="two-stream attention backend; auto: the fastest that works on the device"
    )
    layers: Literal["auto", "local", "te"] = Field(
        "auto",
        description="linear layers and norms: Megatron's own, or Transformer Engine's; auto: te on CUDA if installed",
    )
    fusions: bool = Field(
        True, description="on CUDA: fused bias, dropout, activation, rotary and weight-gradient kernels, as installed"
    )
    masked_rows_only: bool = Field(True, description="run the head on masked rows only, not on every row")
    chunked_cross_entropy: bool = Field(
        True, description="compute head and cross-entropy together, some rows at a time (needs masked_rows_only)"
    )
    skip_last_clean_queries: bool = Field(
        True, description="compute only keys and values of the clean stream in the last layer"
    )
    skip_last_clean_block: bool = Field(
        True, description="end the clean stream before its last block, which none reads"
    )


# Switches that leave out what nobody reads. The plain path computes it, with the dense mask: what is compared with.
SAVINGS = ("masked_rows_only", "chunked_cross_entropy", "skip_last_clean_queries", "skip_last_clean_block")
PLAIN = KernelConfig(attention="reference", **dict.fromkeys(SAVINGS, False))


class Fp8Config(Section):
    """FP8 matrix products in the transformer layers, by Transformer Engine; docs/kernels.md has the rules.

    Attention, norms, head, weights and what lies between layers stay in bf16, and master weights in fp32.
    """

    enabled: bool = False
    recipe: Literal["current", "delayed", "block"] = Field(
        "current",
        description="scale of a tensor: from itself (current), from its past (delayed), or one per block of it (block)",
    )
    format: Literal["auto", "hybrid", "e4m3"] = Field(
        "auto", description="hybrid: gradients are e5m2, the rest e4m3; auto: e4m3 for block, hybrid for the others"
    )
    first_last_bf16: int = Field(0, ge=0, description="so many layers at the start and as many at the end stay in bf16")
    amax_history: int = Field(1024, ge=1, description="delayed: forward passes whose largest values decide the scale")
    margin: int = Field(0, ge=0, description="delayed: scales are smaller by 2^margin")


class OptimizationConfig(Section):
    """What an engine needs to know about the optimizer. The defaults are the paper's recipe."""

    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="of weights and activations; master weights are fp32"
    )
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="not applied to biases and norms")
    clip_norm: float = Field(1.0, ge=0, description="gradient norm is clipped to this; 0 leaves it")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="decay min(ema_decay, (1+n)/(10+n)); 0 keeps no EMA")

    @property
    def bf16(self) -> bool:
        return self.precision == "bf16"

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else 4


class ParallelConfig(Section):
    """How the model is spread over ranks; data parallelism takes what the others leave of the world."""

    tensor: int = Field(1, ge=1, description="tensor-parallel size")
    pipeline: int = Field(1, ge=1, description="pipeline stages")
    interleave: int = Field(1, ge=1, description="model chunks per stage; above 1 runs the interleaved 1F1B schedule")
    context: int = Field(1, ge=1, description="context-parallel size: ranks that share the positions of a row")
    sequence: bool = Field(False, description="sequence parallelism over the tensor-parallel group")
    distributed_optimizer: bool = Field(
        False, description="shard master weights, moments and EMA over data-parallel ranks (Megatron's ZeRO-1)"
    )
    overlap: bool = Field(True, description="reduce gradients over data-parallel ranks while the backward pass goes on")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations computed again in the backward pass: attention's, or every layer's"
    )
    embedding_weight: float = Field(
        0.0, ge=0, description="layers that the embedding counts as when layers are split over stages"
    )
    head_weight: float = Field(0.0, ge=0, description="layers that the head counts as when layers are split")
    backend: Literal["auto", "nccl", "gloo"] = Field("auto", description="process-group backend; auto: nccl on CUDA")
    timeout_minutes: float = Field(10.0, gt=0, description="a rank that makes no progress for so long ends the job")


class ZeroConfig(Section):
    """DeepSpeed ZeRO over the tensor-parallel layers, instead of Megatron's data parallelism."""

    stage: int = Field(
        0,
        ge=0,
        le=3,
        description="data-parallel ranks shard 1: optimizer state, 2: gradients too, 3: weights too; 0: off",
    )
    offload: bool = Field(False, description="keep optimizer state and its update on the CPU (stages 2 and 3)")


class EngineConfig(Section):
    """The sections that decide what an engine computes and how it is sharded."""

    model: ModelConfig = Field(default=ModelConfig())
    diffusion: DiffusionConfig = Field(default=DiffusionConfig())
    kernels: KernelConfig = Field(default=KernelConfig())
    fp8: Fp8Config = Field(default=Fp8Config())
    parallel: ParallelConfig = Field(default=ParallelConfig())
    zero: ZeroConfig = Field(default=ZeroConfig())
    optimization: OptimizationConfig = Field(default=OptimizationConfig())

    def replace(self, **sections: Section) -> EngineConfig:
        """A copy with other sections."""
        return self.model_copy(update=sections)


def split_layers(layers: int, stages: int, embedding_weight: float = 0.0, head_weight: float = 0.0) -> list[int]:
    """Layers of each (virtual) stage, in order, so that the heaviest stage is as light as can be.

    The embedding weighs on the first stage and the head on the last; every stage gets at least one layer. Where
    layers do not divide, stages in the middle get the odd ones, later before earlier, because 1F1B holds fewer
    micro-batches there; then the first, and last the one that has the head.

    Raises:
        ValueError: more stages than layers.
    """
    if stages > layers:
        raise ValueError(f"{layers} layers cannot fill {stages} stages")
    counts = [1] * stages
    extra = [0.0] * stages
    extra[0] += embedding_weight
    extra[-1] += head_weight
    preference = [*range(stages - 2, 0, -1), 0, stages - 1]
    for _ in range(layers - stages):
        lightest = min(preference, key=lambda s: counts[s] + extra[s])
        counts[lightest] += 1
    return counts


def check_layout(config: EngineConfig, world_size: int) -> int:
    """Check the layout against the model and return the data-parallel size.

    Raises:
        ConfigError: one line with the key, its value and the values that fit.
    """
    model, diffusion, parallel = config.model, config.diffusion, config.parallel
    if model.length % diffusion.block_size:
        raise ConfigError(
            f"diffusion.block_size={diffusion.block_size}: model.length={model.length} is not divisible by "
            f"{diffusion.block_size}; use {listing(divisors(model.length, model.length))}"
        )
    _check_tensor(model, parallel)
    _check_context(model, diffusion, parallel)
    _check_pipeline(model, parallel)
    _check_zero(model, parallel, config.zero)
    size = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % size:
        raise ConfigError(
            f"parallel.tensor={parallel.tensor}, parallel.pipeline={parallel.pipeline}, "
            f"parallel.context={parallel.context}: their product {size} does not divide the world of {world_size} "
            f"processes; start a multiple of {size}, or use a product of {listing(divisors(world_size))}"
        )
    return world_size // size


def _check_tensor(model: ModelConfig, parallel: ParallelConfig) -> None:
    tensor = parallel.tensor
    fitting = listing(divisors(math.gcd(model.heads, model.groups, model.ffn)))
    for name, value in (
        ("model.heads", model.heads),
        ("model.kv_heads", model.groups),
        ("model.ffn_hidden", model.ffn),
    ):
        if value % tensor:
            raise ConfigError(f"parallel.tensor={tensor}: {name}={value} is not divisible by {tensor}; use {fitting}")
    if parallel.sequence and tensor == 1:
        raise ConfigError(
            "parallel.sequence=true: parallel.tensor=1 has no group to share the sequence; use parallel.sequence=false "
            "or parallel.tensor=2 and more"
        )
    local = model.length // parallel.context
    if parallel.sequence and local % tensor:
        raise ConfigError(
            f"parallel.sequence=true: the {local} positions of a rank are not divisible by "
            f"parallel.tensor={tensor}; use another model.length, or parallel.sequence=false"
        )


def _check_context(model: ModelConfig, diffusion: DiffusionConfig, parallel: ParallelConfig) -> None:
    """A rank holds two chunks of the row, each of whole blocks (or parts of the only block)."""
    context, length = parallel.context, model.length
    # With one block per row there is no clean stream, and every query sees the whole row.
    unit = 1 if diffusion.block_size == length else diffusion.block_size
    if context > 1 and length % (2 * context * unit):
        fitting = [c for c in range(1, 65) if c == 1 or length % (2 * c * unit) == 0]
        raise ConfigError(
            f"parallel.context={context}: model.length={length} does not make {2 * context} chunks of whole blocks "
            f"(diffusion.block_size={diffusion.block_size}); use {listing(fitting)}"
        )


def _check_pipeline(model: ModelConfig, parallel: ParallelConfig) -> None:
    stages, layers = parallel.pipeline * parallel.interleave, model.layers
    if parallel.interleave > 1 and parallel.pipeline == 1:
        raise ConfigError(
            f"parallel.interleave={parallel.interleave}: parallel.pipeline=1 has nothing to interleave; "
            f"use parallel.interleave=1 or parallel.pipeline=2 and more"
        )
    if stages > layers:
        fewest, most = (2 if parallel.interleave > 1 else 1), layers // parallel.interleave
        fitting = list(range(fewest, most + 1))
        remedy = f"use {listing(fitting)}" if fitting else f"use parallel.interleave={max(1, layers // 2)} or less"
        raise ConfigError(
            f"parallel.pipeline={parallel.pipeline}: model.layers={layers} cannot fill {stages} stages"
            f"{f' (parallel.interleave={parallel.interleave})' if parallel.interleave > 1 else ''}; {remedy}"
        )


def _check_zero(model: ModelConfig, parallel: ParallelConfig, zero: ZeroConfig) -> None:
    stage = zero.stage
    if stage == 0:
        if zero.offload:
            raise ConfigError("zero.offload=true: zero.stage=0 shards nothing; use zero.stage=2 or 3")
        return
    megatron = "zero.stage=0 with parallel.distributed_optimizer=true (ZeRO-1 of the Megatron engine)"
    refused = [
        (parallel.pipeline > 1 and stage > 1, f"parallel.pipeline={parallel.pipeline}", f"zero.stage=1 or {megatron}"),
        (parallel.interleave > 1, f"parallel.interleave={parallel.interleave}", megatron),
        (parallel.context > 1, f"parallel.context={parallel.context}", megatron),
        (model.tie_embeddings and parallel.pipeline > 1, "model.tie_embeddings=true over stages", megatron),
        (
            parallel.distributed_optimizer,
            "parallel.distributed_optimizer=true",
            "one of the two: zero.stage=0 or parallel.distributed_optimizer=false",
        ),
    ]
    for wrong, what, remedy in refused:
        if wrong:
            raise ConfigError(f"zero.stage={stage}: does not work with {what}; use {remedy}")
    if zero.offload and stage == 1:
        raise ConfigError("zero.offload=true: needs the partitioned gradients of zero.stage=2 or 3; use one of them")
