"""Whole tensors and the parts of them that ranks hold: what initial weights, imports and checkpoints share."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


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


def whole_view(local: Tensor, parameter: Tensor, rows: int | None = None) -> Tensor:
    """``local`` (a weight, moment or average shaped like ``parameter``) as part of the whole tensor, sharing memory.

    The whole tensor has one shape under every layout: the vocabulary unpadded, fused gate and up projections as
    ``[2, ffn, ...]``. With one tensor-parallel rank the result is a plain tensor, else a DTensor over the group;
    what is replicated stays plain.

    Args:
        rows: rows of the whole tensor where padding is to be left out (embedding and head), else None.
    """
    local = local.detach()
    if not is_sharded(parameter):
        return local
    dim, stride = parameter.partition_dim, parameter.partition_stride
    shape = list(global_shape(parameter))
    if stride > 1:
        local = local.view(stride, -1, *local.shape[1:])
        shape = [stride, shape[0] // stride, *shape[1:]]
        dim = 1
    if rows is not None:
        first = parallel_state.get_tensor_model_parallel_rank() * local.shape[0]
        local, shape[0] = local[: max(0, rows - first)], rows
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return local
    mesh = DeviceMesh.from_group(parallel_state.get_tensor_model_parallel_group(), local.device.type)
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride())
