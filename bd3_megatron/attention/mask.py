"""The two-stream mask: its streams and its predicate, which every backend is tested against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.attention.lengths import clean_positions
from bd3_megatron.config import DiffusionConfig


@dataclass(frozen=True)
class Streams:
    """The copies of a row that pass through the model in one sequence, laid end to end.

    Hidden states are ``[N, b, h]`` with ``N = noisy * length + clean``: the positions of noisy draw 0, then of draw 1,
    ..., then those of the clean stream. Every stream is contiguous, and streams may differ in length.

    Attributes:
        length: positions of a row, L.
        block_size: tokens per block, B'.
        noisy: number of noisy draws per row, K (0 for the causal objective).
        clean: positions of the clean stream. No query reads its last block, so that it may end before it. A row of
            one block needs no clean stream, because nothing precedes the block.
    """

    length: int
    block_size: int
    noisy: int = 1
    clean: int = 0

    @property
    def count(self) -> int:
        """Streams, S."""
        return self.noisy + (self.clean > 0)

    @property
    def predicting(self) -> int:
        """Tokens whose outputs are predictions: those of the noisy draws, or of the clean stream without draws."""
        return self.noisy * self.length or self.clean

    @property
    def tokens(self) -> int:
        """Tokens of all streams of one row, N."""
        return self.noisy * self.length + self.clean

    @property
    def clean_index(self) -> int:
        """Index of the clean stream; -1, which no stream has, if there is none."""
        return self.noisy if self.clean else -1

    @classmethod
    def of(
        cls, diffusion: DiffusionConfig, length: int, skip_last_clean_block: bool = False, multiple: int = 1
    ) -> Streams:
        """Streams that the objective needs for rows of ``length`` tokens.

        Args:
            skip_last_clean_block: end the clean stream before its last block.
            multiple: the clean stream's length stays a multiple of it.
        """
        if diffusion.objective == "causal":
            return cls(length, block_size=1, noisy=0, clean=length)
        block = diffusion.block_size
        return cls(length, block, diffusion.draws, clean_positions(length, block, skip_last_clean_block, multiple))

    def parts(self, x: Tensor, positions: int | None = None) -> list[Tensor]:
        """``x`` split by stream, ``[N, ...] -> S of [positions, ...]``; without the clean one if ``x`` lacks it.

        Args:
            positions: length of a noisy stream in ``x``; L when None.
        """
        positions = positions or self.length
        if not self.noisy:
            return [x]
        clean = len(x) - self.noisy * positions
        return list(x.split([positions] * self.noisy + ([clean] if clean else [])))


def sees(query_stream: Tensor, query_block: Tensor, key_stream: Tensor | int, key_block: Tensor, clean: int) -> Tensor:
    """The block-causal two-stream mask (arXiv 2503.09573, section 3.2).

    A query sees its own block of its own stream, and every earlier block of the clean stream. For a noisy query
    that is "own noisy block, clean blocks before it"; for a clean query "clean blocks up to its own".

    Args:
        query_stream, query_block: stream index and block index of each query, broadcastable with the keys'.
        key_stream, key_block: stream index and block index of each key.
        clean: index of the clean stream.

    Returns:
        Boolean tensor of the broadcast shape, true where the query sees the key.
    """
    own = (query_stream == key_stream) & (query_block == key_block)
    earlier = (key_stream == clean) & (key_block < query_block)
    return own | earlier


def within_documents(seen: Tensor | bool, query_document: Tensor, key_document: Tensor) -> Tensor:
    """Restrict a mask to the query's own document; all streams share their row's documents.

    Args:
        seen: result of :func:`sees`, or True where a query's block and stream admit every key.
        query_document, key_document: number of the document each belongs to, broadcastable with ``seen``.
    """
    return (query_document == key_document) & seen


def stream_and_position(streams: Streams, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Index of the stream and position in the row of each of the N tokens, int64 ``[N]`` each."""
    lengths = [streams.length] * streams.noisy + [streams.clean] * (streams.clean > 0)
    position = torch.cat([torch.arange(n, device=device) for n in lengths])
    counts = torch.tensor(lengths, device=device)
    return torch.arange(len(lengths), device=device).repeat_interleave(counts), position


def dense_mask(streams: Streams, device: torch.device | None = None, documents: Tensor | None = None) -> Tensor:
    """The mask over all streams laid end to end, ``[N, N]``: for the reference and for tests.

    With ``documents`` ``[b, L]`` every row has its own, ``[b, N, N]``.
    """
    stream, position = stream_and_position(streams, device)
    block = position // streams.block_size
    mask = sees(stream[:, None], block[:, None], stream[None], block[None], streams.clean_index)
    if documents is None:
        return mask
    number = documents[:, position]
    return within_documents(mask, number[:, :, None], number[:, None])


def live_pairs(streams: Streams) -> int:
    """Number of (query, key) pairs of one row that the mask admits, over all streams.

    With ``n = L / B'`` blocks, a noisy draw has ``L B' + (L^2 - L B') / 2`` pairs, and so has a whole clean stream.
    """

    def pairs(length: int, earlier: bool) -> int:
        whole, rest = divmod(length, streams.block_size)
        own = whole * streams.block_size**2 + rest**2
        before = streams.block_size**2 * whole * (whole - 1) // 2 + rest * whole * streams.block_size
        return own + before * earlier

    return streams.noisy * pairs(streams.length, streams.clean > 0) + pairs(streams.clean, True)
