"""Layout of whole tensors over ranks, for initial weights, imports and checkpoints.

A whole tensor has one form under every layout, the form of a checkpoint: the vocabulary unpadded, and the fused gate
and up projections of a gated MLP as ``[2, ffn, ...]``, because each tensor-parallel rank has a part of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

_FUSED = "mlp.linear_fc1"
_AXES = {"weight": 2, "bias": 1}  # of one projection


@dataclass(frozen=True)
class ShardSpec:
    """Place of a parameter's tensor-parallel shard in the whole tensor.

    Attributes:
        shape: of the whole tensor.
        local: shape of this rank's shard in the same form, padding included.
        offsets: where the shard begins in the whole tensor.
        duplicate: another rank has the same values and writes them.
    """

    shape: tuple[int, ...]
    local: tuple[int, ...]
    offsets: tuple[int, ...]
    duplicate: bool = False


@dataclass(frozen=True)
class Chunk:
    """A rectangular part of a whole tensor: the offsets of its first element, and a view of its live values."""

    offsets: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True)
class ShardedTensor:
    """This rank's chunks of a whole tensor: one value of a sharded state dict. Over all ranks the chunks cover it.

    Attributes:
        shape: of the whole tensor.
        chunks: this rank's; none if it has padding only, or nothing.
        duplicate: another rank has the same chunks and writes them.
    """

    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    duplicate: bool = False

    @torch.no_grad()
    def fill(self, whole: Tensor) -> None:
        """Copy this rank's chunks out of the whole tensor (of any shape with the same elements in order)."""
        whole = whole.view(self.shape)
        for chunk in self.chunks:
            chunk.data.copy_(whole[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.data.shape))])


def is_sharded(parameter: Tensor) -> bool:
    """True if tensor-parallel ranks have different parts (Megatron tags its parameters)."""
    return getattr(parameter, "tensor_model_parallel", False)


def global_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole tensor, the vocabulary as padded."""
    shape = list(parameter.shape)
    if is_sharded(parameter):
        shape[parameter.partition_dim] *= parallel_state.get_tensor_model_parallel_world_size()
    return tuple(shape)


def local_shard(full: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole tensor, zero-padded where the vocabulary was rounded up.

    A stride of 2 marks the fused gate and up projections: each rank has a part of both.
    """
    if not is_sharded(parameter):
        return full
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    dim, stride = parameter.partition_dim, parameter.partition_stride
    missing = global_shape(parameter)[dim] - full.shape[dim]
    if missing:
        full = torch.cat([full, full.new_zeros(missing, *full.shape[1:])])
    parts = full.chunk(size * stride, dim)
    return torch.cat([parts[s * size + rank] for s in range(stride)], dim)


def shard_spec(parameter: Tensor, rows: int | None = None, duplicate: bool = False) -> ShardSpec:
    """Place of ``parameter`` (a shard as Megatron tags it, of its full local shape) in the whole tensor.

    Args:
        rows: rows of the whole tensor without padding, for the embedding and the head; None: there is no padding.
        duplicate: another pipeline stage writes this parameter.
    """
    local = tuple(parameter.shape)
    rank = parallel_state.get_tensor_model_parallel_rank()
    if not is_sharded(parameter):
        return ShardSpec(local, local, (0,) * len(local), duplicate or rank > 0)
    size = parallel_state.get_tensor_model_parallel_world_size()
    dim, stride = parameter.partition_dim, parameter.partition_stride
    if stride > 1:
        local, dim = (stride, local[0] // stride, *local[1:]), 1
    shape, offsets = list(local), [0] * len(local)
    shape[dim], offsets[dim] = local[dim] * size, rank * local[dim]
    if rows is not None:
        shape[0] = rows
    return ShardSpec(tuple(shape), local, tuple(offsets), duplicate)


def as_parameter(name: str, whole: Tensor) -> Tensor:
    """A whole tensor as the parameter of this name has it: gate and up projections stacked, ``[2 ffn, ...]``.

    The name decides. Only an MLP's first layer is fused, and without a gate it has no axis for gate and up. Any other
    tensor is returned as it is, whatever its shape.
    """
    module, _, kind = name.rpartition(".")
    fused = module.endswith(f".{_FUSED}") and whole.dim() == _AXES[kind] + 1
    return whole.flatten(0, 1) if fused else whole


def as_stored(name: str, parameter: Tensor, gated: bool) -> Tensor:
    """The whole tensor of a parameter, as a checkpoint has it: the inverse of :func:`as_parameter`.

    Args:
        gated: the model's MLPs have a gate.
    """
    fused = gated and name.rpartition(".")[0].endswith(f".{_FUSED}")
    return parameter.unflatten(0, (2, -1)) if fused else parameter


def sharded_tensor(flat: Tensor, spec: ShardSpec, start: int = 0) -> ShardedTensor:
    """Chunks of a whole tensor that ``flat``, a range of this rank's flattened shard, covers.

    Distributed optimizers own ranges of flattened parameters that begin and end inside rows. A range is cut into part
    of a row, whole rows, and part of a row.

    Args:
        flat: contiguous, of any shape: elements ``start`` to ``start + flat.numel()`` of the flattened shard.
    """
    flat = flat.detach().view(-1)
    chunks = []
    for low, sizes, first in _chunks(spec.local, start, start + flat.numel()):
        data = flat[first - start : first - start + math.prod(sizes)].view(sizes)
        offsets = tuple(o + at for o, at in zip(spec.offsets, low))
        there = min(sizes[0], spec.shape[0] - offsets[0])  # rows that are not padding
        if there > 0:
            chunks.append(Chunk(offsets, data[:there]))
    return ShardedTensor(spec.shape, tuple(chunks), spec.duplicate)


Extent = tuple[tuple[int, ...], tuple[int, ...], int]


def _chunks(shape: tuple[int, ...], start: int, end: int) -> Iterator[Extent]:
    """Chunks (offsets, sizes, flat index of the first element) of the elements [start, end) of an array, in order."""
    if start >= end:
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), end // inner  # whole rows

    def part_of_row(row: int, low: int, high: int) -> Iterator[Extent]:
        for offsets, sizes, at in _chunks(shape[1:], low - row * inner, high - row * inner):
            yield (row, *offsets), (1, *sizes), at + row * inner

    if first > last:
        yield from part_of_row(last, start, end)
        return
    if start < first * inner:
        yield from part_of_row(first - 1, start, first * inner)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]), first * inner
    if last * inner < end:
        yield from part_of_row(last, last * inner, end)
