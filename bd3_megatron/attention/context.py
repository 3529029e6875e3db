"""Context parallelism: the positions of a row on each rank, and the gathering of keys and values.

A row is cut into ``2 size`` chunks of equal length; rank r has chunks r and ``2 size - 1 - r``. A later query sees more
keys, in both streams alike, so that one early and one late chunk give every rank the same work. Queries stay on their
rank. Keys and values are gathered, and their gradients are summed back. A noisy query sees its own block and the clean
stream only, so that noisy keys are not gathered where chunks are whole blocks.
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
        group: None for a single rank, which has all positions.
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
    def positions(self) -> int:
        """Positions of a row on this rank."""
        return self.length // self.size

    @property
    def chunks(self) -> tuple[int, ...]:
        """Chunks of this rank, in their order in memory."""
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

    def gather_streams(self, x: Tensor) -> Tensor:
        """Whole streams ``[S L, ...]`` from every rank's ``[S L / size, ...]``, streams end to end in both."""
        if self.size == 1:
            return x
        by_position = x.unflatten(0, (-1, self.positions)).transpose(0, 1)  # [L / size, S, ...]
        return self.gather(by_position).transpose(0, 1).flatten(0, 1)
