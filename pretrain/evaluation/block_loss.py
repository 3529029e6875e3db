"""Loss inside blocks: mean nll by the number of masked tokens, and the bound by position."""

from __future__ import annotations

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from bd3_megatron.diffusion.block_statistics import count_groups, group_names
from pretrain.distributed.collectives import sum_over_ranks

_UNIT = 2.0**-24
"""nats that an accumulator counts: integers add up alike in any order, so micro-batches and ranks change nothing"""


class BlockLoss:
    """Sums over blocks by count of masked tokens and by position in the block, each in at most 16 groups.

    Args:
        size: B'.
    """

    def __init__(self, size: int):
        self.size = size
        self.edges = np.array(count_groups(size))
        """highest count, or number of the last position (from 1), of each group"""
        groups = len(self.edges)
        self.nll = np.zeros(groups, np.int64)  # in units
        self.masked = np.zeros(groups, np.int64)
        self.nats = np.zeros(groups, np.int64)  # in units

    def add(
        self,
        weighted: NDArray[np.float32],
        weight: NDArray[np.float32],
        rows: NDArray[np.bool_] | None = None,
        share: float = 1.0,
    ) -> None:
        """Add predictions: their weighted nll ``[R, L]`` and their weights ``[R, L]``, zero where nothing is masked.

        Args:
            rows: those that count, ``[R]``; None: all.
            share: factor of the weights by which these draws count.
        """
        if rows is not None:
            weighted, weight = weighted[rows], weight[rows]
        blocks = weighted.reshape(-1, self.size).astype(np.float64)  # [blocks, B']
        weights = weight.reshape(-1, self.size).astype(np.float64)
        count = (weights > 0).sum(1)
        nll = np.divide(blocks, weights, out=np.zeros_like(blocks), where=weights > 0).sum(1)
        some = count > 0
        group = np.searchsorted(self.edges, count[some])
        np.add.at(self.nll, group, _units(nll[some]))
        np.add.at(self.masked, group, count[some])
        position = np.searchsorted(self.edges, np.arange(1, self.size + 1))
        np.add.at(self.nats, position, _units(blocks * share).sum(0))

    def over_ranks(self, group: dist.ProcessGroup) -> BlockLoss:
        """Sum over the data-parallel ranks."""
        total = BlockLoss(self.size)
        mine = np.stack([self.nll, self.masked, self.nats])
        total.nll, total.masked, total.nats = sum_over_ranks(mine, group)
        return total

    def by_count(self) -> dict[str, float]:
        """Mean nll of a masked token, nats, by the number of masked tokens of its block; groups that have any."""
        names = group_names(self.edges.tolist())
        return {name: float(x * _UNIT / n) for name, x, n in zip(names, self.nll, self.masked) if n}

    def by_position(self) -> dict[str, float]:
        """Share of the bound, nats, of each position in the block (from 1); they add up to the whole."""
        return dict(zip(group_names(self.edges.tolist()), map(float, self.nats * _UNIT)))


def _units(nats: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.rint(nats / _UNIT).astype(np.int64)
