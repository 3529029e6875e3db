"""Parameters of each rank: shapes and counts without torch, equal to those of the model that is built.

Tensor parallelism cuts matrices, pipeline stages take layers, and a stage holds one chunk of the model or several
(interleaved). Names and their order are those of :func:`bd3_megatron.engine.stage.named_parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from bd3_megatron.backbones import EMBEDDING, Parameter, Shape
from bd3_megatron.config import ModelConfig, ParallelConfig
from bd3_megatron.layout import split_layers


@dataclass(frozen=True)
class Chunk:
    """One model chunk of one pipeline stage: consecutive layers, and the embedding or the head on the outer stages.

    Attributes:
        first_layer, layers: the layers ``first_layer .. first_layer + layers - 1`` of the whole model.
        embedding, head: True if the chunk begins, ends the model.
    """

    first_layer: int
    layers: int
    embedding: bool
    head: bool


def stage_chunks(model: ModelConfig, parallel: ParallelConfig) -> list[list[Chunk]]:
    """Chunks by pipeline stage, in their order; virtual stage ``v`` is chunk ``v // pipeline`` of stage
    ``v % pipeline``."""
    stages = parallel.pipeline * parallel.interleave
    counts = split_layers(model.layers, stages, parallel.embedding_weight, parallel.head_weight)
    if parallel.pipeline == 1:
        counts = [model.layers]
    made, first = [], 0
    for number, count in enumerate(counts):
        made.append(Chunk(first, count, number == 0, number == len(counts) - 1))
        first += count
    return [made[stage :: parallel.pipeline] for stage in range(parallel.pipeline)]


def padded_rows(vocab_size: int, tensor: int) -> int:
    """Rows of embedding and head: the vocabulary rounded up to a multiple of the tensor-parallel size."""
    return -(-vocab_size // tensor) * tensor


# Bytes of a chunk's logits in fp32: small enough for a CPU's cache; on a GPU, enough rows for efficient products.
_CHUNK_BYTES, _CUDA_CHUNK_BYTES = 2**24, 2**29


def rows_per_chunk(columns: int, cuda: bool) -> int:
    """Rows whose logits over so many columns the head computes at a time: a power of two, 128 at the least."""
    rows = (_CUDA_CHUNK_BYTES if cuda else _CHUNK_BYTES) // (4 * columns)
    return max(128, 1 << (rows.bit_length() - 1))


def parameter_shapes(model: ModelConfig, chunk: Chunk, tensor: int = 1) -> dict[str, Shape]:
    """Shape of every parameter of a chunk on one tensor-parallel rank, by global name, in the order of the model.

    A tied head has the embedding's name on a stage of its own, and no parameter on the embedding's stage.
    """
    backbone, shapes = model.family, {}

    def add(parameters: Iterator[Parameter]) -> None:
        shapes.update({parameter.name: parameter.local(tensor) for parameter in parameters})

    if chunk.embedding:
        add(backbone.embedding_parameters(model, model.vocab_size))
    for layer in range(chunk.first_layer, chunk.first_layer + chunk.layers):
        add(backbone.layer_parameters(model, layer))
    if chunk.head:
        add(backbone.head_parameters(model, model.vocab_size))
        if model.tie_embeddings and not chunk.embedding:
            add(backbone.embedding_parameters(model, model.vocab_size))
    return shapes


def parameter_count(model: ModelConfig, chunk: Chunk, tensor: int = 1) -> int:
    """Number of parameters of a chunk on one tensor-parallel rank, vocabulary padding included."""
    return sum(map(math.prod, parameter_shapes(model, chunk, tensor).values()))


# ---- Megatron's gradient buffers, and the shards of the distributed optimizer ----


@dataclass(frozen=True)
class GradientBuffer:
    """One chunk's contiguous gradient buffer (Megatron's ``_ParamAndGradBuffer``).

    Attributes:
        places: (start, end) of every parameter in the buffer.
        buckets: (start, end) of the parts that are reduced in one collective; ends include padding.
    """

    places: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        """Elements with padding."""
        return self.buckets[-1][1]

    def owned(self, ranks: int) -> list[int]:
        """Number of parameters, without padding, that each of ``ranks`` data-parallel ranks updates: an equal part of
        every bucket."""
        counts = [0] * ranks
        for low, high in self.buckets:
            size = (high - low) // ranks
            for start, end in self.places:
                start, end = max(start, low), min(end, high)
                while start < end:
                    rank = (start - low) // size
                    stop = min(end, low + (rank + 1) * size)
                    counts[rank] += stop - start
                    start = stop
        return counts


def gradient_buffer(
    shapes: dict[str, Shape], sharded: bool, ranks: int, bucket_size: int | None, own_bucket: bool = False
) -> GradientBuffer:
    """Lay out parameters in a buffer as Megatron-core 0.16 does, the last one first.

    Args:
        sharded: with the distributed optimizer, which aligns parameters to 64 elements and pads buckets to
            lcm(ranks, 128).
        ranks: data-parallel ranks, context-parallel ones included.
        bucket_size: elements after which a bucket is closed; None makes one bucket.
        own_bucket: stages share the embedding, for which the distributed optimizer has a bucket of its own.
    """

    def aligned(value: int, to: int) -> int:
        return -(-value // to) * to if sharded else value

    unit = math.lcm(ranks, 128)
    places, buckets, start, bucket = [], [], 0, 0
    for name, shape in reversed(shapes.items()):
        alone = own_bucket and sharded and name == EMBEDDING
        start = aligned(start, 64)
        if alone and start > bucket:
            start = aligned(start, unit)
            buckets.append((bucket, start))
            bucket = start
        end = start + math.prod(shape)
        places.append((start, end))
        start = end
        if alone or (bucket_size is not None and end - bucket >= bucket_size):
            start = aligned(end, unit)
            buckets.append((bucket, start))
            bucket = start
    if not buckets or places[-1][1] > buckets[-1][1]:
        buckets.append((bucket, aligned(places[-1][1], unit)))
    return GradientBuffer(tuple(places), tuple(buckets))
