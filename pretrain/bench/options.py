"""Options of the benchmarks, importable without torch: `bd3 bench NAME --help` answers at once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bd3_common.registry import Choice
from bd3_megatron.attention.backends import ATTENTION_BACKENDS, AUTO
from bd3_megatron.backbones import BACKBONES
from bd3_megatron.config import Section, Seed
from pretrain.bench.layouts import LAYOUTS
from pretrain.config import checkpoint_options

SCATTER_GROUPS = 8
"""groups of samples, for the standard error of a variance"""
Coupling = Literal["independent", "antithetic", "complementary"]


class ModelOptions(Section):
    """Options that benchmarks of one process share."""

    backbone: Annotated[str, Choice(BACKBONES)] = Field(default="dit", description="model.backbone")
    layers: int = Field(default=4, ge=1)
    hidden: int = Field(default=256, ge=1)
    heads: int = Field(default=4, ge=1)
    block_size: int = Field(default=16, ge=1, description="tokens per block, B'")
    vocab_size: int = Field(default=4096, ge=2)
    batch: int = Field(default=8, ge=1, description="rows per step")
    threads: int = Field(default=1, ge=1, le=4096, description="CPU threads")
    json_: bool = Field(default=False, description="print one line of JSON")


class AttentionOptions(Section):
    """Forward and backward pass of the two-stream attention, beside dense SDPA with the mask of all streams, causal
    attention of the same kernels, and a matmul. CPU time of one process on CPU, CUDA events on CUDA."""

    lengths: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        default=(1024, 2048), min_length=1, description="row lengths L"
    )
    block_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(16,), min_length=1, description="tokens per block"
    )
    heads: int = Field(default=8, ge=1)
    kv_heads: int | None = Field(default=None, ge=1, description="key and value heads; null means as many as heads")
    head_dim: int = Field(default=64, ge=2, description="width of a head")
    batch: int = Field(default=2, ge=1, description="rows")
    draws: int = Field(default=1, ge=1, description="noisy draws per clean row, K")
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        default=None, description="null means fp32 on CPU, bf16 on CUDA"
    )
    backends: tuple[Annotated[str, Choice(ATTENTION_BACKENDS)], ...] | None = Field(
        default=None, description="null means all that kernels.attention=auto may take on this device"
    )
    repeats: int = Field(default=5, ge=1, description="measured passes of each; they take turns")
    threads: int = Field(default=1, ge=1, le=4096, description="CPU threads")
    plot: str | None = Field(default=None, description="PNG of TFLOP/s against the length")
    json_: bool = Field(default=False, description="print one line of JSON")


class StepOptions(ModelOptions):
    """Cost of one training step (forward, backward, optimizer, EMA) beside the plain path of the same model (dense
    two-stream mask, nothing left out, logits for every row) and beside an autoregressive step (causal objective).
    CPU time of one process on CPU, wall time on CUDA. MFU is of the bf16 peak, with FP8 too."""

    preset: str | None = Field(
        default=None, description="model and objective of a preset, instead of the sizes given here"
    )
    lengths: tuple[Annotated[int, Field(ge=2)], ...] | None = Field(
        default=None, min_length=1, description="row lengths L; null means 256 and 1024, or the preset's"
    )
    draws: int = Field(default=1, ge=1, description="noisy draws per clean row, K")
    repeats: int = Field(default=5, ge=1, description="measured steps of each path; they take turns")
    precision: Literal["fp32", "bf16"] = Field(default="fp32")
    recompute: Literal["none", "selective", "full"] = Field(
        default="none", description="parallel.recompute of all paths"
    )
    attention: Annotated[str, Choice(ATTENTION_BACKENDS, (AUTO,))] = Field(
        default=AUTO, description="kernels.attention of our path"
    )
    layers_kind: Literal["auto", "local", "te"] = Field(default="auto", description="kernels.layers of our path")
    fp8: Literal["none", "current", "delayed", "block"] = Field(default="none", description="FP8 recipe of our path")
    plain: bool = Field(default=True, description="also run the plain path, whose mask and logits need much memory")
    causal: bool = Field(default=True, description="also run an autoregressive step")
    plot: str | None = Field(default=None, description="PNG of the ratios against the length")


class HeadOptions(Section):
    """Forward and backward pass of head and cross-entropy over the rows of a micro-batch, of which a part is masked:
    in chunks over masked rows, with whole logits of masked rows, and with logits of every row. CPU time of one process
    on CPU, CUDA events on CUDA."""

    hidden: int = Field(default=256, ge=1)
    vocab_sizes: tuple[Annotated[int, Field(ge=2)], ...] = Field(default=(4096, 50304), min_length=1)
    rows: int = Field(default=2048, ge=16, description="rows of the noisy streams")
    mask_rate: float = Field(default=0.5, gt=0, le=1, description="part of the rows that is masked")
    dtype: Literal["fp32", "bf16"] | None = Field(default=None, description="null means fp32 on CPU, bf16 on CUDA")
    repeats: int = Field(default=5, ge=1, description="measured passes of each; they take turns")
    threads: int = Field(default=1, ge=1, le=4096, description="CPU threads")
    json_: bool = Field(default=False, description="print one line of JSON")


class CheckpointOptions(ModelOptions):
    """Cost of a checkpoint of one process: how long training stalls for it and what it loses in all, written in the
    background and waited for; bytes; seconds to find it (checksums) and to load it. All in wall time."""

    length: int = Field(default=256, ge=2, description="row length L")
    batch: int = Field(default=4, ge=1, description="rows per step")
    repeats: int = Field(default=5, ge=1, description="checkpoints of each kind; they take turns")
    precision: Literal["fp32", "bf16"] = Field(default="fp32")
    folder: str | None = Field(default=None, description="where to write; null: a temporary folder")


class MemoryOptions(ModelOptions):
    """Bytes that one training step keeps for its backward pass, and its time, with parallel.recompute = none,
    selective and full. On CUDA also the peak of all allocations."""

    length: int = Field(default=1024, ge=2, description="tokens per row, L")
    backbone: Annotated[str, Choice(BACKBONES)] = Field(default="qwen3", description="model.backbone")
    layers: int = Field(default=8, ge=1)
    batch: int = Field(default=2, ge=1, description="rows per micro-batch")


class DrawsOptions(checkpoint_options.CheckpointOptions):
    """Variance of the gradient of a run's checkpoint on training rows: K noisy draws over one clean row, by their
    coupling, beside K separate pairs of streams. Dropout is off. What counts is variance times FLOPs, because a mean
    over n times as many samples has 1/n of the variance at n times the cost."""

    weights: Literal["ema", "raw"] = Field(default="raw", description="EMA weights, or the last step's")
    data: str | None = Field(default=None, description="data set; null means the one the run was trained on")
    rows: int = Field(default=8, ge=1, description="clean rows per gradient")
    micro_batch: int | None = Field(default=None, ge=1, description="rows per forward pass; null means as in training")
    samples: int = Field(default=64, ge=2 * SCATTER_GROUPS, description="gradients per estimator")
    draws: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        default=(2,), min_length=1, description="draws per clean row, K"
    )
    couplings: tuple[Coupling, ...] = Field(
        default=("independent", "antithetic", "complementary"),
        min_length=1,
        description="diffusion.coupling of the draws",
    )
    masking: Literal["levels", "counts"] | None = Field(
        default=None, description="diffusion.masking; null: as in training"
    )
    count_probabilities: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        default=None, description="diffusion.count_probabilities; null: as in training"
    )
    beta: float | None = Field(
        default=None, gt=0, le=1, description="lower end of the noise levels; null: as in training"
    )
    omega: float | None = Field(
        default=None, gt=0, le=1, description="upper end of the noise levels; null: as in training"
    )
    stratify: bool | None = Field(default=None, description="levels one per stratum; null means as in training")
    fresh_rows: bool = Field(
        default=True, description="also with other rows for each gradient: the variance of rows and noise"
    )
    seed: Seed = Field(default=0, description="seed of the noise")
    threads: int = Field(default=1, ge=1, le=4096, description="CPU threads")
    json_: bool = Field(default=False, description="print one line of JSON")


class CountsOptions(checkpoint_options.CheckpointOptions):
    """Gradient of one block of a run's training rows, by the number of its masked tokens; the probabilities of counts
    under which the gradient of the likelihood bound varies least; and by how much the gradient of a block varies under
    other objectives. Dropout is off."""

    weights: Literal["ema", "raw"] = Field(default="raw", description="EMA weights, or the last step's")
    data: str | None = Field(default=None, description="data set; null means the one the run was trained on")
    samples: int = Field(default=256, ge=2 * SCATTER_GROUPS, description="blocks per count, each of another row")
    seed: Seed = Field(default=0, description="seed of the masks")
    threads: int = Field(default=1, ge=1, le=4096, description="CPU threads")
    json_: bool = Field(default=False, description="print one line of JSON")


class DataOptions(Section):
    """Rates of preparing text (one process beside bare tokenizers, many beside one) and of reading random rows
    (beside numpy.memmap and webdataset). What is compared takes turns in one process, and the fastest turn of each
    counts, because other work on the machine can only add. CPU time, page cache hot; wall time where processes are
    compared."""

    text: str | None = Field(default=None, description="text as bd3 prep takes it; null: the bundled novels")
    tokenizer: str = Field(default="bpe:8192", description="bpe:N trains one on the text first, uncounted; else a file")
    megabytes: float = Field(
        default=8, gt=0, description="text that one process prepares in a turn; repeated to this size"
    )
    scaling_megabytes: float = Field(default=16, gt=0, description="text that the numbers of workers are compared on")
    workers: tuple[Annotated[int, Field(ge=2)], ...] = Field(default=(2,), description="processes to compare with one")
    length: int = Field(default=1024, ge=4, description="tokens per row, L")
    batch: int = Field(default=256, ge=1, description="random rows read at once")
    rows: int = Field(default=32768, ge=1, description="rows to read from")
    shards: int = Field(default=64, ge=1, description="tars that these rows lie in")
    repeats: int = Field(default=7, ge=1, description="turns of each")
    json_: bool = Field(default=False, description="print one line of JSON")


class ParityOptions(Section):
    """Train one tiny model under every layout and compare with one process: loss and every gradient of the first
    step within 1e-5, losses, gradient norms and weights of all steps within 1e-4, noise bit for bit. Ends with exit
    code 1 when a layout is off."""

    layouts: tuple[str, ...] | None = Field(
        default=None, description="layouts to run; null means all: " + ", ".join(LAYOUTS)
    )
    backbone: Annotated[str, Choice(BACKBONES)] = Field(default="qwen3", description="model.backbone")
    layers: int = Field(default=4, ge=1)
    hidden: int = Field(default=32, ge=1)
    heads: int = Field(default=4, ge=1)
    kv_heads: int | None = Field(
        default=None, ge=1, description="key and value heads; null means half of heads, if the backbone allows it"
    )
    tie_embeddings: bool = Field(
        default=False, description="head shares the embedding's weight (ZeRO with PP refuses that)"
    )
    length: int = Field(default=32, ge=2, description="tokens per row, L")
    block_size: int = Field(default=4, ge=1, description="tokens per block, B'")
    draws: int = Field(default=1, ge=1, description="noisy draws per clean row, K")
    vocab_size: int = Field(default=61, ge=2, description="an odd number shows that padding is right")
    global_batch: int = Field(default=8, ge=1, description="rows per step")
    micro_batch: int = Field(default=2, ge=1, description="rows per micro-batch")
    steps: int = Field(default=10, ge=1, description="optimizer steps")
    documents: bool = Field(default=False, description="rows hold several documents, and attention is limited to them")
    json_: bool = Field(default=False, description="print one line of JSON")
