"""Layout of the model over ranks: checks, and the split of layers over pipeline stages. Needs no torch."""

from __future__ import annotations

import heapq
import math

from bd3_common.errors import ConfigError
from bd3_megatron.config import (
    DiffusionConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    ZeroConfig,
    divisors,
    listing,
)


def split_layers(layers: int, stages: int, embedding_weight: float = 0.0, head_weight: float = 0.0) -> list[int]:
    """Number of layers of each (virtual) stage, in order; the heaviest stage is as light as possible.

    The embedding's cost counts for the first stage and the head's for the last; every stage has at least one layer.
    Layers that are left over go to stages in the middle, later ones first, because 1F1B has fewer micro-batches in
    flight there; then to the first stage, and then to the last.

    Raises:
        ValueError: more stages than layers.
    """
    if stages > layers:
        raise ValueError(f"{layers} layers cannot fill {stages} stages")
    counts = [1] * stages
    extra = [0.0] * stages
    extra[0] += embedding_weight
    extra[-1] += head_weight
    preference = [*range(stages - 2, 0, -1), 0, stages - 1] if stages > 1 else [0]
    weights = [(counts[stage] + extra[stage], order, stage) for order, stage in enumerate(preference)]
    heapq.heapify(weights)
    for _ in range(layers - stages):
        _, order, lightest = weights[0]
        counts[lightest] += 1
        heapq.heapreplace(weights, (counts[lightest] + extra[lightest], order, lightest))
    return counts


def check_layout(config: EngineConfig, world_size: int) -> int:
    """Check the layout against the model, and return the data-parallel size.

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
    """A rank has two chunks of the row, each of whole blocks (or parts of the only block)."""
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
        fitting = list(range(fewest, min(most, 64) + 1))
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
