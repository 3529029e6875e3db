"""Whole tensors and the parts of them that ranks hold: what initial weights, imports and checkpoints share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor


@dataclass(frozen=True)
class ShardSpec:
    """How a parameter's tensor-parallel shard lies in the whole tensor.

    The whole tensor has one shape under every layout: the vocabulary unpadded, fused gate and up projections as
    ``[2, ffn, ...]``.

    Attributes:
        shape: of the whole tensor.
        local: shape of this rank's shard in the same form, padding included.
        offsets: where the shard begins in the whole tensor.
        duplicate: another rank holds the same values and is the one that writes them.
    """

    shape: tuple[int, ...]
    local: tuple[int, ...]
    offsets: tuple[int, ...]
    duplicate: bool = False


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor: where it begins, and its values as a view of live memory."""

    offsets: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True)
class Held:
    """What this rank holds of a whole tensor. Over all ranks the pieces cover it.

    Attributes:
        shape: of the whole tensor.
        pieces: this rank's boxes; none where padding or another rank's share is all there is.
        duplicate: another rank holds the same and is the one that writes it.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    duplicate: bool = False

    @torch.no_grad()
    def fill(self, whole: Tensor) -> None:
        """Copy this rank's boxes out of the whole tensor (of any shape with the same elements in order)."""
        whole = whole.view(self.shape)
        for piece in self.pieces:
            piece.data.copy_(whole[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.data.shape))])


def is_sharded(parameter: Tensor) -> bool:
    """Whether tensor-parallel ranks hold different parts (Megatron tags its parameters)."""
    return getattr(parameter, "tensor_model_parallel", False)


def global_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole tensor, the vocabulary as padded."""
    shape = list(parameter.shape)
    if is_sharded(parameter):
        shape[parameter.partition_dim] *= parallel_state.get_tensor_model_parallel_world_size()
    return tuple(shape)


def local_shard(full: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole tensor, zero-padded where the vocabulary was rounded up.

    A stride of 2 marks the fused gate and up projections: each rank holds its part of both.
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
        rows: rows of the whole tensor where padding is to be left out (embedding and head), else None.
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


def held(flat: Tensor, spec: ShardSpec, start: int = 0) -> Held:
    """What this rank holds of a whole tensor when ``flat`` is part of its flattened shard.

    Sharded optimizers own ranges of flattened parameters that respect no row. A range is at most a few boxes:
    part of a row, whole rows, part of a row.

    Args:
        flat: contiguous, of any shape: elements ``start`` to ``start + flat.numel()`` of the flattened shard.
    """
    flat = flat.detach().view(-1)
    pieces = []
    for low, sizes, first in _boxes(spec.local, start, start + flat.numel()):
        data = flat[first - start : first - start + math.prod(sizes)].view(sizes)
        offsets = tuple(o + at for o, at in zip(spec.offsets, low))
        there = min(sizes[0], spec.shape[0] - offsets[0])  # rows that are not padding
        if there > 0:
            pieces.append(Piece(offsets, data[:there]))
    return Held(spec.shape, tuple(pieces), spec.duplicate)


Box = tuple[tuple[int, ...], tuple[int, ...], int]


def _boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """Boxes (offsets, sizes, flat index of the first element) of the elements [start, end) of an array, in order."""
    if start >= end:
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), end // inner  # whole rows

    def part_of_row(row: int, low: int, high: int) -> Iterator[Box]:
        for offsets, sizes, at in _boxes(shape[1:], low - row * inner, high - row * inner):
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
