"""Traffic: bytes that a rank sends in one training step, by kind.

Ring algorithms are assumed: an all-reduce of n bytes over r ranks sends ``2 (r-1)/r n`` from every rank, a gather or
a reduce-scatter half of that. Norms, losses and maxima, a few numbers each, are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from bd3_megatron.config import EngineConfig, ModelConfig, ParallelConfig, ZeroConfig
from bd3_megatron.cost.memory import State
from bd3_megatron.cost.partition import Chunk, padded_rows

_FP32 = 4


@dataclass(frozen=True)
class Traffic:
    """One kind of communication of one rank.

    Attributes:
        kind: description for people.
        sent: bytes that the rank sends in a step.
        span: number of consecutive ranks that contain the group; a node with as many devices contains it too.
        hidden: True if it overlaps with computation (gradients, in the backward pass).
    """

    kind: str
    sent: float
    span: int
    hidden: bool = False


def spans(parallel: ParallelConfig, world_size: int) -> dict[str, int]:
    """Number of consecutive ranks that contain a group of each kind; Megatron orders ranks by tensor, context, data,
    pipeline."""
    tensor, context = parallel.tensor, parallel.tensor * parallel.context
    return {"tensor": tensor, "context": context, "data": world_size // parallel.pipeline, "pipeline": world_size}


def step_traffic(
    config: EngineConfig,
    *,
    chunks: list[Chunk],
    stages: list[tuple[int, int]],
    state: State,
    positions: float,
    after: float,
    clean_positions: float,
    head_rows: float,
    micro_batch: int,
    micro_batches: int,
    data_size: int,
) -> list[Traffic]:
    """Traffic of one rank of a pipeline stage, without the kinds that send nothing.

    Args:
        stages: for each of them, (virtual stages before, virtual stages after) in the whole model, 0 at the ends.
        chunks: the stage's model chunks.
        state: memory of the rank.
        positions: positions of a whole row in all streams.
        after: those of them that leave the last layer.
        clean_positions: those of them whose keys and values context-parallel ranks exchange.
        head_rows: positions of a micro-batch that the head reads on one rank.
    """
    model, parallel, size = config.model, config.parallel, config.optimization.element_bytes
    reach = spans(parallel, data_size * parallel.tensor * parallel.context * parallel.pipeline)
    hidden = positions / parallel.context * micro_batch * model.hidden * size  # one activation of all streams
    layers = sum(chunk.layers for chunk in chunks)
    tensor = _tensor(model, parallel, chunks, hidden, hidden * after / positions, head_rows * model.hidden * size)
    sequence = " gather and reduce-scatter" if parallel.sequence else " all-reduce"
    part = hidden / (parallel.tensor if parallel.sequence else 1)
    passed = part * sum(bool(before) + bool(after) for before, after in stages) * micro_batches
    passes = 1 if parallel.recompute == "none" else 2
    grouped = 2 * model.groups * model.width_per_head / parallel.tensor
    gathered = clean_positions * micro_batch * grouped * size * _part(parallel.context)
    found = [
        Traffic("tensor-parallel" + sequence, tensor * micro_batches, reach["tensor"]),
        Traffic("pipeline point-to-point", passed, reach["pipeline"]),
        Traffic(
            "context-parallel gather of keys and values",
            gathered * layers * (passes + 1) * micro_batches,
            reach["context"],
        ),
        *_data(parallel, config.zero, state, data_size, size, micro_batches, reach["data"]),
    ]
    if model.tie_embeddings and parallel.pipeline > 1 and any(chunk.embedding or chunk.head for chunk in chunks):
        table = padded_rows(model.vocab_size, parallel.tensor) // parallel.tensor * model.hidden * _FP32
        found.append(Traffic("tied embedding's gradient, first and last stage", table, reach["pipeline"]))
    return [traffic for traffic in found if traffic.sent > 0]


def _part(ranks: int) -> float:
    return (ranks - 1) / ranks


def _tensor(
    model: ModelConfig, parallel: ParallelConfig, chunks: list[Chunk], hidden: float, after: float, rows: float
) -> float:
    """Bytes of one micro-batch: attention's and the MLP's outputs forward, their inputs' gradients backward.

    With sequence parallelism each all-reduce is a gather and a reduce-scatter, and the backward pass gathers the
    inputs of both column-parallel layers again. The last layer gathers its input once, sends ``after`` instead of
    ``hidden`` behind its keys and values, and gathers the residual stream to share it out anew. Full recomputation
    repeats the forward part. The embedding's output is summed in the forward pass, the gradient of the head's rows in
    the backward pass.
    """
    total = 0.0
    for chunk in chunks:
        for layer in range(chunk.first_layer, chunk.first_layer + chunk.layers):
            leaves = layer == model.layers - 1 and after < hidden
            forward, backward = 4 * hidden, (6 if parallel.sequence else 4) * hidden
            if leaves and parallel.sequence:
                forward, backward = 2 * hidden + 3 * after, hidden + 5 * after
            elif leaves:
                forward, backward = 4 * after, 2 * hidden + 2 * after
            total += forward * (2 if parallel.recompute == "full" else 1) + backward
        if chunk.embedding:
            total += 2 * hidden
        if chunk.head:
            total += 2 * rows + (after if parallel.sequence else 0)
    return _part(parallel.tensor) * total


def _data(
    parallel: ParallelConfig, zero: ZeroConfig, state: State, data_size: int, size: int, micro_batches: int, span: int
) -> list[Traffic]:
    """Gradients and weights over data-parallel ranks, context-parallel ones included.

    DeepSpeed (read from version 0.19): stages 1 and 2 all-reduce gradients in fp32, stage 2 after every micro-batch;
    stage 3 scatters them and gathers every weight for the forward and again for the backward pass.
    """
    ranks = data_size * parallel.context
    part, gradients, weights = _part(ranks), state.parameters * _FP32, state.parameters * size
    if zero.stage == 3:
        return [
            Traffic("ZeRO-3 weight gather", 2 * micro_batches * part * weights, span),
            Traffic("ZeRO-3 gradient reduce-scatter", micro_batches * part * gradients, span),
        ]
    if zero.stage:
        times = micro_batches if zero.stage == 2 else 1
        return [
            Traffic(f"ZeRO-{zero.stage} gradient all-reduce", times * 2 * part * gradients, span),
            Traffic(f"ZeRO-{zero.stage} weight gather", part * weights, span),
        ]
    if parallel.distributed_optimizer:
        return [
            Traffic("data-parallel gradient reduce-scatter", part * state.gradients, span, parallel.overlap),
            Traffic("data-parallel weight gather", part * state.weights, span),
        ]
    return [Traffic("data-parallel gradient all-reduce", 2 * part * state.gradients, span, parallel.overlap)]
