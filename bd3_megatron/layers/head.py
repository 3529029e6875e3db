"""Fused output head and cross-entropy: logits of a few rows at a time, vocabulary sharded over ranks.

Logits are the largest tensor of a training step. Here only those of one chunk of rows exist at a time, and gradients
by rows and by weight are computed while they exist. The cost: the three matrix products of the plain path, and memory
for one chunk and one gradient of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from bd3_megatron.cost import partition


@dataclass(frozen=True)
class VocabularyShard:
    """This tensor-parallel rank's columns of the logits.

    Attributes:
        start, columns: the first column and their number.
        never: global ids that are never predicted: the mask token and padding.
    """

    start: int
    columns: int
    never: tuple[int, ...]

    @classmethod
    def of_this_rank(cls, columns: int, never: tuple[int, ...]) -> VocabularyShard:
        return cls(parallel_state.get_tensor_model_parallel_rank() * columns, columns, never)

    def forbid(self, logits: Tensor) -> Tensor:
        """Set columns that are never predicted to -inf, in place and outside autograd.

        The softmax of these columns is zero, and so is their gradient.
        """
        values = logits.detach()
        for column in (v - self.start for v in self.never):
            if 0 <= column < logits.shape[-1]:
                values[..., column] = -torch.inf
        return logits


def rows_per_chunk(columns: int, device: torch.device) -> int:
    """Number of rows whose logits exist at a time."""
    return partition.rows_per_chunk(columns, device.type == "cuda")


def linear_cross_entropy(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    factors: Tensor,
    shard: VocabularyShard,
    nll: Tensor | None = None,
) -> Tensor:
    """``sum_m factors[m] nll[m]`` of the softmax over ``rows @ weight.T + bias``, fp32 scalar, the same on all ranks.

    Args:
        rows: ``[M, h]``, the same on all tensor-parallel ranks.
        weight, bias: ``[V / tensor, h]``, ``[V / tensor]``, this rank's.
        labels: int64 ``[M]``, global ids.
        factors: fp32 ``[M]``; gets no gradient. A row with factor zero counts for nothing, whatever its label.
        nll: fp32 ``[M]``, filled with the nll of every row.
    """
    return _LinearCrossEntropy.apply(rows, weight, bias, labels, factors, shard, nll)


def cross_entropy(rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, shard: VocabularyShard) -> Tensor:
    """nll ``[M]`` of each row in fp32, without a backward pass; arguments as in :func:`linear_cross_entropy`."""
    size = rows_per_chunk(shard.columns, rows.device)
    with torch.no_grad():
        chunks = zip(rows.split(size), labels.split(size))
        return torch.cat([_chunk(part, weight, bias, wanted, shard)[0] for part, wanted in chunks])


def _chunk(
    rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, shard: VocabularyShard
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll ``[C]``, ``softmax - onehot`` of this rank's columns ``[C, V / tensor]``."""
    logits = shard.forbid(F.linear(rows, weight, bias).float())
    highest = logits.amax(-1)
    group = parallel_state.get_tensor_model_parallel_group()
    many = dist.get_world_size(group) > 1
    if many:
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    logits -= highest[:, None]
    column = labels - shard.start
    inside = (column >= 0) & (column < shard.columns)
    column = column.clamp(0, shard.columns - 1)[:, None]
    target = torch.where(inside, logits.gather(1, column)[:, 0], 0.0)
    probability = logits.exp_()
    sums = torch.stack([target, probability.sum(-1)])
    if many:
        dist.all_reduce(sums, group=group)
    target, total = sums
    return total.log() - target, probability, total, (column, inside)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, bias, labels, factors, shard, filled):
        size = rows_per_chunk(shard.columns, rows.device)
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = torch.zeros((), device=rows.device)
        by_rows = torch.empty_like(rows) if needed else None
        by_weight = torch.zeros(weight.shape, device=weight.device) if needed else None
        by_bias = None if bias is None or not needed else torch.zeros(bias.shape, device=bias.device)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            nll, probability, sums, (column, inside) = _chunk(rows[part], weight, bias, labels[part], shard)
            if filled is not None:
                filled[part] = nll
            # A row without a factor may have a label that is never predicted: 0 * inf would spoil the sum.
            total += torch.where(factors[part] != 0, nll * factors[part], 0.0).sum()
            if not needed:
                continue
            by_logits = probability.mul_((factors[part] / sums)[:, None])
            by_logits.scatter_add_(1, column, torch.where(inside, -factors[part], 0.0)[:, None])
            if by_bias is not None:
                by_bias += by_logits.sum(0)
            by_logits = by_logits.to(rows.dtype)
            torch.mm(by_logits, weight, out=by_rows[part])
            if weight.dtype == torch.float32:
                by_weight.addmm_(by_logits.t(), rows[part])
            else:
                by_weight += by_logits.t() @ rows[part]
        ctx.save_for_backward(by_rows, by_weight, by_bias)
        ctx.types = rows.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx, upstream):
        by_rows, by_weight, by_bias = ctx.saved_tensors
        by_rows = (by_rows * upstream.float().expand_as(by_rows)).to(by_rows.dtype)  # the factor keeps its precision
        group = parallel_state.get_tensor_model_parallel_group()
        if dist.get_world_size(group) > 1:
            dist.all_reduce(by_rows, group=group)
        by_weight, by_bias = (None if x is None else (x * upstream).to(ctx.types[1]) for x in (by_weight, by_bias))
        return by_rows, by_weight, by_bias, None, None, None, None
