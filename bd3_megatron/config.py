"""Configuration sections of the model, the objective and the layout: frozen pydantic models, without torch.

A mistake is one line with the dotted key, its value and the remedy, for example
``parallel.tensor=3: model.heads=8 is not divisible by 3; use 1, 2, 4 or 8``. Validators here check one section;
:mod:`bd3_megatron.layout` and :mod:`bd3_megatron.layers.fp8` check sections against each other.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bd3_common.registry import Choice
from bd3_common.schema import MAX_LENGTH, MAX_VOCABULARY
from bd3_common.text import counted
from bd3_megatron.attention.backends import ATTENTION_BACKENDS, AUTO
from bd3_megatron.backbones import BACKBONES, Backbone, Traits
from bd3_megatron.diffusion.schedules import SCHEDULES

MAX_LAYERS = 10_000
MAX_WIDTH = 2**24
MAX_SPLIT = 1024
"""most ranks of one kind of parallelism, data parallelism aside"""
MAX_ROWS = 2**22
"""most rows of a batch"""
ABSENT = "absent"


def absent(value: Any) -> dict[str, Any]:
    """Extra of a field that was added after the first release: the value that a configuration means without it.

    It says how runs were before the field existed, whatever its default is now.
    """
    return {ABSENT: value}


# The range that Philox, torch's generators and JSON share.
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """Base class of configuration sections: immutable, finite numbers only, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def before_new_keys(section: type[Section]) -> dict[str, Any]:
    """Values of the section's newer keys that a file without them means (:func:`absent`)."""
    extras = {name: field.json_schema_extra for name, field in section.model_fields.items()}
    return {name: extra[ABSENT] for name, extra in extras.items() if isinstance(extra, dict) and ABSENT in extra}


def divisors(n: int, limit: int = 64) -> list[int]:
    """Divisors of ``n`` not above ``limit``, ascending."""
    low = [d for d in range(1, min(math.isqrt(n), limit) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low if n // d <= limit)})


def listing(values: list[int]) -> str:
    """``[1, 2, 4] -> "1, 2 or 4"`` for error texts."""
    words = [str(v) for v in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


class RopeScaling(Section):
    """Change of the rotary frequencies of a model whose rows became longer than those it was first trained with."""

    kind: Literal["none", "linear", "llama3"] = Field(
        default="none",
        description="linear: all frequencies divided by the factor; llama3: low ones divided, high ones kept, between "
        "them a smooth passage",
        json_schema_extra=absent("none"),
    )
    factor: float = Field(default=1.0, ge=1, description="divisor of the frequencies", json_schema_extra=absent(1.0))
    low: float = Field(
        default=1.0,
        gt=0,
        description="llama3: frequencies of fewer turns over original_length are divided by the whole factor",
        json_schema_extra=absent(1.0),
    )
    high: float = Field(
        default=4.0, gt=0, description="llama3: those of more turns are kept", json_schema_extra=absent(4.0)
    )
    original_length: int = Field(
        default=8192,
        ge=1,
        le=MAX_LENGTH,
        description="llama3: row length of the first training",
        json_schema_extra=absent(8192),
    )

    @model_validator(mode="after")
    def _order(self) -> RopeScaling:
        if self.low >= self.high:
            raise ValueError(
                f"model.rope_scaling.low={self.low:g}: must be below model.rope_scaling.high={self.high:g}; exchange "
                f"them"
            )
        if self.kind == "none" and self.factor != 1:
            raise ValueError(
                f"model.rope_scaling.factor={self.factor:g}: model.rope_scaling.kind=none divides nothing; use linear "
                f"or llama3"
            )
        return self


class ModelConfig(Section):
    """Shape of the transformer."""

    backbone: Annotated[str, Choice(BACKBONES)] = Field(
        default="qwen3", description="transformer family: decides norms, activation and biases"
    )
    layers: int = Field(default=12, ge=1, le=MAX_LAYERS, description="transformer layers")
    hidden: int = Field(default=768, ge=1, le=MAX_WIDTH, description="width of the residual stream")
    heads: int = Field(default=12, ge=1, le=MAX_WIDTH, description="query heads")
    kv_heads: int | None = Field(
        default=None, ge=1, le=MAX_WIDTH, description="key and value heads; null: as many as model.heads"
    )
    head_dim: int | None = Field(
        default=None, ge=2, le=MAX_WIDTH, description="width of one head; null: hidden / heads"
    )
    ffn_hidden: int | None = Field(
        default=None, ge=1, le=MAX_WIDTH, description="width of the MLP; null: the backbone's default"
    )
    length: int = Field(default=1024, ge=2, le=MAX_LENGTH, description="tokens per row, L")
    vocab_size: int | None = Field(
        default=None,
        ge=2,
        le=MAX_VOCABULARY,
        description="tokens in the vocabulary, the mask token included; null: the data set's",
    )
    mask_id: int | None = Field(default=None, ge=0, description="id of the mask token; null: the data set's")
    bos_id: int | None = Field(
        default=None, ge=0, description="id of the token that begins a row; null: the data set's"
    )
    eos_id: int | None = Field(
        default=None, ge=0, description="id of the token that ends a document; null: the data set's"
    )
    pad_id: int | None = Field(
        default=None,
        ge=0,
        description="id of the token that exports pad with; null: the data set's, else EOS",
        json_schema_extra=absent(None),
    )
    rope_theta: float = Field(default=10_000.0, gt=0, description="base of the rotary position frequencies")
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float | None = Field(default=None, gt=0, description="epsilon of the norms; null: the backbone's default")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout probability on the outputs of attention and MLP"
    )
    tie_embeddings: bool = Field(default=False, description="the output head uses the embedding's weight")
    init_std: float = Field(default=0.02, gt=0, description="standard deviation of the initial weights")

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
        return BACKBONES.instance(self.backbone)

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
        """Number of parameters with ``vocab_size`` tokens, vocabulary padding not counted."""
        return sum(math.prod(parameter.shape) for parameter in self.family.parameters(self, vocab_size))


LOWEST_LEVEL = 1e-3
"""the lowest noise level of the whole interval: at 0 the weight of most schedules is infinite"""
WHOLE_INTERVAL = {"schedule": "loglinear", "beta": LOWEST_LEVEL, "omega": 1.0, "resample": False}
"""values of the diffusion section with which noise levels estimate the likelihood bound, and counts are drawn"""
MAX_COUNT_WEIGHT = 1e6
"""largest loss weight of a token in blocks with one count of masked tokens"""


class DiffusionConfig(Section):
    """Training objective (arXiv 2503.09573). ``block_size = 1`` with ``beta = omega = 1`` is AR with an exact
    likelihood, ``block_size = model.length`` is MDLM, and ``objective = causal`` is the plain causal LM."""

    objective: Literal["diffusion", "causal"] = Field(
        default="diffusion",
        description="diffusion: predict masked tokens block by block; causal: predict the next token",
    )
    block_size: int = Field(default=16, ge=1, le=MAX_LENGTH, description="tokens per block, B'")
    masking: Literal["levels", "counts"] = Field(
        default="levels",
        description="levels: draw a noise level per block, then each token's mask; counts: draw how many tokens of "
        "the block are masked",
        json_schema_extra=absent("levels"),
    )
    schedule: Annotated[str, Choice(SCHEDULES)] = Field(
        default="loglinear", description="noise schedule: mask probability as a function of the noise level t"
    )
    beta: float = Field(default=1e-3, gt=0, le=1, description="lowest noise level t that is drawn")
    omega: float = Field(default=1.0, gt=0, le=1, description="highest noise level t that is drawn")
    resample: bool = Field(
        default=False, description="redraw a block's mask until its masked fraction lies in [beta, omega]"
    )
    stratify: bool = Field(
        default=True, description="spread noise levels evenly over the global batch, for lower variance"
    )
    draws: int = Field(default=1, ge=1, le=1024, description="noisy copies of every row in one pass, K")
    coupling: Literal["independent", "antithetic", "complementary"] = Field(
        default="independent",
        description="pairs of draws: antithetic mirrors the noise level of the second, complementary also its mask",
    )

    count_probabilities: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        default=None,
        description="with masking=counts: probability of each count 0..B'; null: the same for 1..B'",
        json_schema_extra=absent(None),
    )
    count_weights: tuple[Annotated[float, Field(ge=0, le=MAX_COUNT_WEIGHT)], ...] | None = Field(
        default=None,
        description="with masking=counts: loss weight of each count 0..B'; null: those of the likelihood bound",
        json_schema_extra=absent(None),
    )
    noise_version: int = Field(
        default=2,
        ge=1,
        le=2,
        description="1: as in runs before there was a version: neighbouring blocks have similar levels; "
        "2: every row spans the interval",
        json_schema_extra=absent(1),
    )

    @model_validator(mode="after")
    def _counts(self) -> DiffusionConfig:
        given = {"count_probabilities": self.count_probabilities, "count_weights": self.count_weights}
        named = [name for name, value in given.items() if value is not None]
        if self.masking == "levels":
            for name in named:
                raise ValueError(f"diffusion.{name}: only with diffusion.masking=counts; set it to null")
            return self
        if self.objective == "causal":
            raise ValueError("diffusion.masking=counts: diffusion.objective=causal masks nothing; use levels")
        whole = dict(WHOLE_INTERVAL)
        if self.beta == self.omega == 1:
            del whole["beta"]  # every token masked: the same law with blocks of one token
        other = {name: value for name, value in whole.items() if getattr(self, name) != value}
        if other:
            set_to = ", ".join(f"diffusion.{name}={value}" for name, value in other.items())
            set_now = ", ".join(f"diffusion.{name}={getattr(self, name)}" for name in other)
            raise ValueError(
                f"{set_now}: diffusion.masking=counts draws no noise levels; use {set_to}, or diffusion.masking=levels"
            )
        for name in named:
            values = given[name] or ()
            if len(values) != self.block_size + 1:
                raise ValueError(
                    f"diffusion.{name}: {len(values)} numbers for the counts 0 to {self.block_size}; "
                    f"give {self.block_size + 1}"
                )
        q = self.count_probabilities
        if named and self.coupling == "complementary":
            raise ValueError(
                f"diffusion.{named[0]}: diffusion.coupling=complementary has counts of its own; use antithetic"
            )
        if q is not None and abs(sum(q) - 1) > 1e-6:
            raise ValueError(f"diffusion.count_probabilities: the sum is {sum(q):g}; it must be 1")
        if q is not None and q[0] == 1:
            raise ValueError("diffusion.count_probabilities: never masks a token; give a count above 0 a probability")
        if q is not None and self.count_weights is None:
            for k, probability in enumerate(q[1:], 1):
                if k * probability * MAX_COUNT_WEIGHT < 1:
                    raise ValueError(
                        f"diffusion.count_probabilities: {probability:g} for {counted(k, 'masked token')}, so rare "
                        f"that the likelihood bound needs a weight over {MAX_COUNT_WEIGHT:g}; raise it, or give "
                        f"diffusion.count_weights too"
                    )
        return self

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
        return SCHEDULES.instance(self.schedule).linear and abs(self.beta + self.omega - 1) < 1e-9

    @property
    def mean_masked_fraction(self) -> float:
        """Expected fraction of a block's tokens that is masked, BOS counted as another token."""
        size = self.block_size
        if self.masking == "levels":
            return SCHEDULES.instance(self.schedule).mean_mask_probability(self.beta, self.omega)
        if self.count_probabilities is not None:
            return sum(k * q for k, q in enumerate(self.count_probabilities)) / size
        return 0.5 if self.coupling == "complementary" else (size + 1) / (2 * size)

    @property
    def loss_name(self) -> str:
        """What the training loss is: a bound on the negative log-likelihood, or not."""
        if self.objective == "causal":
            return "negative log-likelihood"
        if self.masking == "counts":
            return "by counts, likelihood bound" if self.count_weights is None else "by weighted counts, no bound"
        if not self.full_interval and not (self.block_size == self.beta == 1):
            resampled = ", resampled" if self.resample else ""
            return f"levels in [{self.beta:g}, {self.omega:g}]{resampled}, no bound"
        if self.schedule in ("loglinear", "log"):
            return "by levels, likelihood bound"
        return f"by levels, {self.schedule} schedule, near the likelihood bound"

    @property
    def full_interval(self) -> bool:
        """True for the unclipped schedule, whose draws are never redrawn (docs/science.md, step 7)."""
        return self.beta <= LOWEST_LEVEL and self.omega >= 1


class KernelConfig(Section):
    """Choice of implementations. They differ in cost, not in the result."""

    attention: Annotated[str, Choice(ATTENTION_BACKENDS, (AUTO,))] = Field(
        default=AUTO, description="two-stream attention backend; auto: the fastest that works on the device"
    )
    layers: Literal["auto", "local", "te"] = Field(
        default="auto",
        description="linear layers and norms: Megatron (local), Transformer Engine (te); auto: te on CUDA if installed",
    )
    fusions: bool = Field(
        default=True,
        description="fused bias, dropout, activation, rotary and weight-gradient kernels, as installed (CUDA)",
    )
    masked_rows_only: bool = Field(default=True, description="compute logits of masked positions only")
    chunked_cross_entropy: bool = Field(
        default=True, description="compute logits and cross-entropy a few positions at a time (needs masked_rows_only)"
    )
    skip_last_clean_queries: bool = Field(
        default=True, description="last layer: compute only keys and values of the clean stream"
    )
    skip_last_clean_block: bool = Field(
        default=True, description="leave the last block out of the clean stream: no block attends to it"
    )


# Switches that skip unused work. The plain path, which tests and benchmarks compare with, does all of it.
SAVINGS = ("masked_rows_only", "chunked_cross_entropy", "skip_last_clean_queries", "skip_last_clean_block")
PLAIN = KernelConfig.model_validate({"attention": "reference"} | dict.fromkeys(SAVINGS, False))


class Fp8Config(Section):
    """FP8 matrix products in the transformer layers, by Transformer Engine; docs/kernels.md has the rules.

    Attention, norms, head, weights and the activations between layers are bf16, master weights fp32.
    """

    enabled: bool = Field(default=False, description="run the layers' matrix products in FP8")
    recipe: Literal["current", "delayed", "block"] = Field(
        default="current",
        description="scale of a tensor: by its maximum (current), by past maxima (delayed), block by block (block)",
    )
    format: Literal["auto", "hybrid", "e4m3"] = Field(
        default="auto",
        description="hybrid: gradients e5m2, the rest e4m3; auto: e4m3 for recipe block, else hybrid",
    )
    first_last_bf16: int = Field(
        default=0, ge=0, description="number of first layers, and of last layers, that stay in bf16"
    )
    amax_history: int = Field(
        default=1024, ge=1, description="recipe delayed: number of past forward passes whose maxima set the scale"
    )
    margin: int = Field(default=0, ge=0, description="recipe delayed: divide scales by 2^margin")

    @property
    def multiple(self) -> int:
        """Divisor of all widths and token counts on a rank; 1 without FP8."""
        if not self.enabled:
            return 1
        return 128 if self.recipe == "block" else 16


class OptimizationConfig(Section):
    """Optimizer settings of an engine. The defaults are the paper's recipe."""

    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="type of weights and activations; master weights are fp32"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the first moment")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's decay of the second moment")
    adam_eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay; biases and norms have none")
    clip_norm: float = Field(default=1.0, ge=0, description="clip the gradient norm to this; 0: no clipping")
    ema_decay: float = Field(
        default=0.9999,
        ge=0,
        lt=1,
        description="decay of the EMA weights: min(ema_decay, (1+n)/(10+n)) after n updates; 0: no EMA",
    )

    @property
    def bf16(self) -> bool:
        """True for bf16 weights and activations."""
        return self.precision == "bf16"

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else 4


class ParallelConfig(Section):
    """Layout of the model over ranks. The data-parallel size is the world divided by the other sizes."""

    tensor: int = Field(default=1, ge=1, le=MAX_SPLIT, description="tensor-parallel size")
    pipeline: int = Field(default=1, ge=1, le=MAX_SPLIT, description="pipeline stages")
    interleave: int = Field(
        default=1, ge=1, le=MAX_SPLIT, description="model chunks per pipeline stage; above 1: interleaved 1F1B schedule"
    )
    context: int = Field(
        default=1,
        ge=1,
        le=MAX_SPLIT,
        description="context-parallel size: ranks over which the positions of a row are split",
    )
    sequence: bool = Field(default=False, description="sequence parallelism over the tensor-parallel group")
    distributed_optimizer: bool = Field(
        default=False,
        description="shard master weights, Adam moments and EMA over data-parallel ranks (ZeRO-1)",
    )
    overlap: bool = Field(default=True, description="overlap the reduction of gradients with the backward pass")
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="recompute activations in the backward pass: attention (selective) or whole layers (full)",
    )
    embedding_weight: float = Field(
        default=0.0, ge=0, description="cost of the embedding, in layers, when layers are split over pipeline stages"
    )
    head_weight: float = Field(
        default=0.0, ge=0, description="cost of the output head, in layers, when layers are split over pipeline stages"
    )
    backend: Literal["auto", "nccl", "gloo"] = Field(
        default="auto", description="process-group backend; auto: nccl on CUDA"
    )
    timeout_minutes: float = Field(
        default=10.0, gt=0, le=1_000_000, description="end the job if a rank makes no progress for this many minutes"
    )


class ZeroConfig(Section):
    """DeepSpeed ZeRO, in place of Megatron's data parallelism; tensor parallelism is Megatron's."""

    stage: int = Field(
        default=0,
        ge=0,
        le=3,
        description="0: off; 1: shard optimizer state over data-parallel ranks; 2: also gradients; 3: also weights",
    )
    offload: bool = Field(default=False, description="keep and update optimizer state on the CPU (stages 2 and 3)")


class EngineConfig(Section):
    """The sections from which an engine is built: one object for engines, model, checks and costs."""

    model: ModelConfig = Field(default=ModelConfig())
    diffusion: DiffusionConfig = Field(default=DiffusionConfig())
    kernels: KernelConfig = Field(default=KernelConfig())
    fp8: Fp8Config = Field(default=Fp8Config())
    parallel: ParallelConfig = Field(default=ParallelConfig())
    zero: ZeroConfig = Field(default=ZeroConfig())
    optimization: OptimizationConfig = Field(default=OptimizationConfig())

    @property
    def token_multiple(self) -> int:
        """Divisor of the positions of every stream on a context-parallel rank."""
        return self.fp8.multiple * (self.parallel.tensor if self.parallel.sequence else 1)

    def replace(self, **sections: Section) -> EngineConfig:
        """A copy with other sections."""
        return self.model_copy(update=sections)
