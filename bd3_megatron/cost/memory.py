"""Memory of a rank between steps: bytes of weights, gradients, master weights, moments and EMA.

The counts follow from the shapes of :mod:`bd3_megatron.cost.partition` and equal the tensors that engines allocate.
Memory of one micro-batch is counted in :mod:`bd3_megatron.cost.activations`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from bd3_megatron.backbones import Shape
from bd3_megatron.config import EngineConfig, OptimizationConfig, ParallelConfig, ZeroConfig
from bd3_megatron.cost.partition import gradient_buffer, parameter_shapes, stage_chunks

# Elements of DeepSpeed's buffer for gradients on their way to other ranks (``reduce_bucket_size``, stages 2 and 3).
ZERO_BUCKET = 500_000_000
# Elements below which stage 3 keeps a parameter whole on every rank (``param_persistence_threshold``).
_PERSISTENT = 100_000
_FP32 = 4


@dataclass(frozen=True)
class State:
    """Bytes that one rank needs all the time.

    Attributes:
        weights: in the type of computation, bf16 or fp32.
        gradients: fp32 sums over micro-batches.
        masters: fp32 master weights; 0 if weights are fp32 themselves.
        moments: Adam's two, fp32.
        ema: EMA weights, fp32.
        parameters: number of parameters in the model's shards, vocabulary padding included.
        owned: number of them that this rank updates.
        host: bytes of the above in CPU memory (ZeRO's offload).
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    ema: int
    parameters: int
    owned: int
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.masters + self.moments + self.ema - self.host

    def parts(self) -> dict[str, int]:
        values = asdict(self)
        return {name: values[name] for name in ("weights", "gradients", "masters", "moments", "ema")}


def state_bytes(config: EngineConfig, data_size: int, stage: int = 0) -> list[State]:
    """Memory of every data-parallel rank of a pipeline stage.

    Args:
        config: with ``model.vocab_size`` resolved.
        data_size: data-parallel ranks, context-parallel ones not included.

    Returns:
        One entry if all data-parallel ranks need the same, else one for each (context-parallel ranks included).
    """
    model, parallel, optimization = config.model, config.parallel, config.optimization
    chunks = [parameter_shapes(model, chunk, parallel.tensor) for chunk in stage_chunks(model, parallel)[stage]]
    if config.zero.stage:
        return _zero(chunks[0], config.zero, optimization, data_size)
    size, ranks = optimization.element_bytes, data_size * parallel.context
    parameters = sum(_elements(shapes) for shapes in chunks)
    # Megatron reduces in buckets on the first stage only, where the reduction is on the critical path.
    bucket = max(40_000_000, 1_000_000 * data_size) if parallel.overlap and stage == 0 else None
    sharded = parallel.distributed_optimizer
    shared = model.tie_embeddings and parallel.pipeline > 1
    buffers = [gradient_buffer(shapes, sharded, ranks, bucket, shared) for shapes in chunks]
    buffered = sum(buffer.elements for buffer in buffers)
    owned = [parameters]
    if sharded:
        owned = [sum(counts) for counts in zip(*(buffer.owned(ranks) for buffer in buffers))]
    return [
        State(
            weights=(buffered if sharded else parameters) * size,
            gradients=buffered * _FP32,
            masters=count * _FP32 if size < _FP32 else 0,
            moments=2 * count * _FP32,
            ema=count * _FP32 if optimization.ema_decay > 0 else 0,
            parameters=parameters,
            owned=count,
        )
        for count in owned
    ]


def heaviest(states: list[State]) -> State:
    """The entry of the rank that needs most."""
    return max(states, key=lambda state: state.total + state.host)


def _zero(shapes: dict[str, Shape], zero: ZeroConfig, optimization: OptimizationConfig, ranks: int) -> list[State]:
    """DeepSpeed's stages (version 0.19): matrices and vectors are flattened apart, padded, and cut evenly.

    Stages 1 and 2 keep the flattened weights; stage 1 in bf16 keeps all gradients in fp32 (its ``BF16_Optimizer``)
    and stage 1 in fp32 those of autograd. Stage 3 cuts every parameter by itself and keeps small ones whole.
    """
    size, parameters = optimization.element_bytes, _elements(shapes)
    if zero.stage == 3:
        part = sum(-(-math.prod(shape) // ranks) for shape in shapes.values())
        small = sum(n for n in map(math.prod, shapes.values()) if n <= _PERSISTENT)
        flat, weights, gradients = part * ranks, part * size + small * size, part * _FP32
    else:
        groups = [sum(math.prod(s) for s in shapes.values() if (len(s) > 1) == matrix) for matrix in (True, False)]
        part = sum(-(-count // (2 * ranks)) * 2 for count in groups)
        flat = part * ranks
        weights, gradients = flat * size, (flat if zero.stage == 1 else part) * _FP32
    owned = min(part, parameters)
    masters, moments = part * _FP32, 2 * part * _FP32
    ema = owned * _FP32 if optimization.ema_decay > 0 else 0
    host = masters + moments + ema + gradients if zero.offload else 0
    return [State(weights, gradients, masters, moments, ema, parameters, owned, host)]


def _elements(shapes: dict[str, Shape]) -> int:
    return sum(map(math.prod, shapes.values()))


# ---- checkpoints ----

# A chunk has an entry in its file's header and one in the index: its name twice, its place and its shape.
_CHUNK_BYTES = 125
_CHUNK_INDEX_BYTES = 215
_LISTING_BYTES = 600


def checkpoint_bytes(config: EngineConfig, data_size: int) -> int:
    """Bytes of one checkpoint folder: fp32 chunks of weights, two moments and EMA, their index and the list of files.

    The vocabulary is unpadded, and replicas are written once. Every tensor-parallel shard is a chunk of its own;
    sharded optimizers cut some parameters into up to three chunks for every rank that owns a part.
    """
    model, parallel, zero = config.model, config.parallel, config.zero
    whole = parameter_shapes(model, stage_chunks(model, ParallelConfig())[0][0])
    sections = 4 if config.optimization.ema_decay > 0 else 3
    chunks = 0
    for shape in whole.values():
        chunks += parallel.tensor if len(shape) > 1 else 1
    if parallel.distributed_optimizer or zero.stage:
        ranks = data_size * parallel.context
        # Cuts between ranks fall inside parameters: each leaves part of a row, whole rows, part of a row twice.
        cuts = (ranks - 1) * parallel.pipeline * parallel.tensor
        chunks += 5 * cuts if zero.stage < 3 else 4 * len(whole) * (ranks - 1)
    values = sections * _elements(whole) * _FP32
    return values + sections * chunks * (_CHUNK_BYTES + _CHUNK_INDEX_BYTES) + _LISTING_BYTES
