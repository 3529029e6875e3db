"""Which query sees which key: the one predicate that every backend is tested against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.config import DiffusionConfig


@dataclass(frozen=True)
class Streams:
    """The copies of a row that pass through the model together, stacked on the batch axis.

    Hidden states are ``[L, count * b, h]``: the rows of noisy draw 0, then of draw 1, ..., then the clean rows.

    Attributes:
        block_size: tokens per block, B'.
        noisy: number of noisy draws per row, K (0 for the causal objective).
        clean: whether the clean stream is present. A row of one block needs none, because nothing precedes it.
    """

    block_size: int
    noisy: int = 1
    clean: bool = True

    @property
    def count(self) -> int:
        return self.noisy + self.clean

    @classmethod
    def of(cls, diffusion: DiffusionConfig, length: int) -> Streams:
        """Streams that the objective needs for rows of ``length`` tokens."""
        if diffusion.objective == "causal":
            return cls(block_size=1, noisy=0, clean=True)
        return cls(diffusion.block_size, diffusion.draws, clean=diffusion.block_size < length)

    @property
    def clean_index(self) -> int:
        """Index of the clean stream; when there is none, an index no stream has."""
        return self.noisy if self.clean else -1


def sees(query_stream: Tensor, query_block: Tensor, key_stream: Tensor, key_block: Tensor, clean: int) -> Tensor:
    """The block-causal two-stream mask (arXiv 2503.09573, section 3.2; one row of it per table row of the paper).

    A query sees its own block of its own stream, and every earlier block of the clean stream. For a noisy query
    that is "own noisy block, clean blocks before it"; for a clean query "clean blocks up to its own".

    Args:
        query_stream, query_block: stream index and block index of each query, broadcastable with the keys'.
        key_stream, key_block: the same of each key.
        clean: index of the clean stream.

    Returns:
        Boolean tensor of the broadcast shape, true where the query sees the key.
    """
    own = (query_stream == key_stream) & (query_block == key_block)
    earlier = (key_stream == clean) & (key_block < query_block)
    return own | earlier


def within_documents(seen: Tensor | bool, query_document: Tensor, key_document: Tensor) -> Tensor:
    """Of the keys that :func:`sees` admits, those of the query's own document; all streams share their row's documents.

    Args:
        seen: what :func:`sees` gave, or True where a query's block and stream admit every key.
        query_document, key_document: number of the document each belongs to, broadcastable with ``seen``.
    """
    return (query_document == key_document) & seen


def dense_mask(
    length: int, streams: Streams, device: torch.device | None = None, documents: Tensor | None = None
) -> Tensor:
    """The mask over all streams laid end to end, ``[count * L, count * L]``: for the reference and for tests.

    With ``documents`` ``[b, L]`` every row has its own, ``[b, count * L, count * L]``.
    """
    block = (torch.arange(length, device=device) // streams.block_size).repeat(streams.count)
    stream = torch.arange(streams.count, device=device).repeat_interleave(length)
    mask = sees(stream[:, None], block[:, None], stream[None], block[None], streams.clean_index)
    if documents is None:
        return mask
    number = documents.repeat(1, streams.count)
    return within_documents(mask, number[:, :, None], number[:, None])


def live_pairs(length: int, streams: Streams) -> int:
    """Number of (query, key) pairs of one row that the mask admits, over all streams.

    With ``n = L / B'`` blocks, a noisy draw has ``L B' + (L^2 - L B') / 2`` pairs, and so has the clean stream.
    """
    own = length * streams.block_size
    earlier = (length * length - own) // 2 if streams.clean else 0
    return streams.count * (own + earlier)
