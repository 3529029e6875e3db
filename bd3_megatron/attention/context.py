"""Context parallelism: which positions of a row a rank holds, and how it comes by what the others hold.

A row is cut into ``2 size`` chunks of equal length, and rank r holds chunks r and ``2 size - 1 - r``. The later a query
stands the more keys it sees, in both streams alike, so that an early and a late chunk together are the same work on
every rank. Queries stay where they are; keys and values are gathered, and the gradients of what was gathered are
summed back. A noisy query sees beside its own block the clean stream only: chunks of whole blocks leave the noisy
keys at home.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


@dataclass(frozen=True)
class ContextShard:
    """One rank's share of the positions ``0 .. length - 1`` of every row.

    Attributes:
        length: positions of a whole row, L.
        size, rank: of the context-parallel group.
        group: None for a single rank, which holds everything.
    """

    length: int
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @classmethod
    def of_this_rank(cls, length: int) -> ContextShard:
        """The shard that Megatron's process groups give to this process."""
        size = parallel_state.get_context_parallel_world_size()
        if size == 1:
            return cls(length)
        rank, group = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_group()
        return cls(length, size, rank, group)

    @property
    def chunk(self) -> int:
        """Positions per chunk."""
        return self.length if self.size == 1 else self.length // (2 * self.size)

    @property
    def held(self) -> int:
        """Positions of a row that this rank holds."""
        return self.length // self.size

    @property
    def chunks(self) -> tuple[int, ...]:
        """Chunks of this rank, in the order in which it holds them."""
        return (0,) if self.size == 1 else (self.rank, 2 * self.size - 1 - self.rank)

    def take(self, x: Tensor, dim: int) -> Tensor:
        """This rank's positions of a whole ``x``, along ``dim``; ``x`` itself for a single rank."""
        if self.size == 1:
            return x
        chunks = x.split(self.chunk, dim)
        return torch.cat([chunks[c] for c in self.chunks], dim)

    def gather(self, x: Tensor) -> Tensor:
        """Whole rows ``[L, ...]`` from every rank's ``[L / size, ...]``; in the backward pass gradients are summed."""
        if self.size == 1:
            return x
        # [2 size chunks in rank order, chunk, ...]: rank r brought chunks r and 2 size - 1 - r.
        parts = gather_from_sequence_parallel_region(x.contiguous(), group=self.group).split(self.chunk)
        first, last = parts[0::2], parts[1::2]
        return torch.cat([*first, *reversed(last)])
