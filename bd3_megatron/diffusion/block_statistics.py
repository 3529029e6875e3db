"""Statistics of a training step over its blocks: variance of the block loss, masked fraction, nll by count."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bd3_megatron.diffusion.batches import Batch

GROUPS = 16
"""at most so many groups of counts"""


def count_groups(size: int) -> list[int]:
    """Highest count of each group of the counts 1..B', at most 16 groups of about the same size."""
    groups = min(size, GROUPS)
    return [round(group * size / groups) for group in range(1, groups + 1)]


def group_names(edges: list[int]) -> list[str]:
    """Name of each group: ``3``, or ``65-128``."""
    return [str(high) if low == high else f"{low}-{high}" for low, high in zip([1, *(e + 1 for e in edges)], edges)]


class BlockStatistics:
    """Sums over the blocks of one rank's micro-batches, on their device; nothing waits for them until they are read.

    The loss of a block is the mean over its B' tokens of the weighted nll. The sums are additive over ranks.

    Args:
        size: B'.
    """

    def __init__(self, size: int, device: torch.device):
        self.size, self.edges = size, count_groups(size)
        self.limits = torch.tensor(self.edges, device=device)
        # Blocks, their losses, squares of their losses, masked tokens; nll by group, masked tokens by group.
        self.sums = torch.zeros(4 + 2 * len(self.edges), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, nll: Tensor, batch: Batch) -> None:
        """Add a micro-batch: the nll ``[P]`` of ``batch.predicted``; where the weight is zero it counts for nothing."""
        factors, predicted = batch.weight.flatten(), batch.predicted
        assert predicted is not None  # made with the batch
        nll = torch.where(factors[predicted] != 0, nll.detach().double(), 0.0)
        by_position = torch.zeros(len(factors), dtype=torch.float64, device=nll.device)
        by_position.index_add_(0, predicted, nll)
        blocks, weights = by_position.view(-1, self.size), factors.view(-1, self.size)  # [blocks, B']
        loss = (blocks * weights).sum(1) / self.size
        count = (weights != 0).sum(1)
        group = torch.searchsorted(self.limits, count.clamp(min=1))
        self.sums[:4] += torch.stack([loss.new_tensor(len(loss)), loss.sum(), loss.square().sum(), count.sum()])
        groups = len(self.edges)
        self.sums[4 : 4 + groups].index_add_(0, group, blocks.sum(1))
        self.sums[4 + groups :].index_add_(0, group, count.double())

    @staticmethod
    def fields(size: int, sums: Tensor) -> Mapping[str, float | None]:
        """Numbers for metrics from the sums over all ranks.

        ``block_variance``: of the block loss; ``masked_fraction``: of all tokens; ``nll_by_count_K``: mean nll of a
        masked token in blocks of which K are masked; ``bound``: their mean over K, an estimate of the likelihood bound
        whatever levels or counts were drawn (nats per token); None if the step had no block of some K. Blocks of a
        count whose weight is 0 count as unmasked.
        """
        edges = count_groups(size)
        blocks, first, second, masked, *rest = sums.tolist()
        nll, counts = rest[: len(edges)], rest[len(edges) :]
        values: dict[str, float | None] = {
            "block_variance": second / blocks - (first / blocks) ** 2,
            "masked_fraction": masked / (blocks * size),
        }
        means = [x / n if n else None for x, n in zip(nll, counts)]
        widths = [high - low for low, high in zip([0, *edges], edges)]
        known = [mean * width for mean, width in zip(means, widths) if mean is not None]
        values["bound"] = sum(known) / size if len(known) == len(means) else None
        return values | {f"nll_by_count_{name}": mean for name, mean in zip(group_names(edges), means)}
