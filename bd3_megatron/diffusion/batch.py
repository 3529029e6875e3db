"""From rows of token ids to what the model reads and what it is asked to predict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.mask import Streams
from bd3_megatron.diffusion.noise import Noise


@dataclass
class Batch:
    """One micro-batch of ``b`` rows.

    Attributes:
        input_ids: int64 ``[S b, L]``, whole streams: the rows of noisy draw 0, then of draw 1, ..., then clean ones.
        labels: int64 ``[R, L]``, what position l of the first R rows of ``input_ids`` predicts; R is K b for the
            diffusion objective and b for the causal one.
        weight: float32 ``[R, L]``, weight of each prediction's nll, zero where there is none.
        tokens: what the sum of weighted nll is divided by for the training loss (objective, step 6): L per row for
            the diffusion objective (BOS counted), L - 1 for the causal one.
        documents: int32 ``[b, L]``, which document of its row each position belongs to, for attention that keeps to
            documents; None lets a query see all of its row. The K draws of a row share its documents.
        predicted: int64 ``[P]``, which of the flattened ``[R L]`` predictions have a weight, ascending, filled up
            with one that has none: see :func:`predicted_positions`. Made from ``weight`` where it is None.
    """

    input_ids: Tensor
    labels: Tensor
    weight: Tensor
    tokens: int
    documents: Tensor | None = None
    predicted: Tensor | None = None

    def __post_init__(self) -> None:
        if self.predicted is None:
            self.predicted = predicted_positions(self.weight)

    def take(self, context: ContextShard) -> Batch:
        """The positions that one context-parallel rank holds.

        ``tokens`` and ``documents`` stay those of the whole rows, because keys come from all ranks.
        """
        if context.size == 1:
            return self
        ids, labels, weight = (context.take(x, 1) for x in (self.input_ids, self.labels, self.weight))
        return Batch(ids, labels, weight, self.tokens, self.documents)

    def to(self, device: torch.device) -> Batch:
        held = (self.input_ids, self.labels, self.weight, self.documents, self.predicted)
        held = [None if x is None else x.to(device, non_blocking=True) for x in held]
        return Batch(*held[:3], self.tokens, *held[3:])


def predicted_positions(weight: Tensor) -> Tensor:
    """Flat indices ``[P]`` of what has a weight, padded so that few different sizes P occur.

    Found where the batch is made, so that no GPU has to wait for a count. P is a multiple of 16 (which matrix products
    of 8 bits need) and of a 64th of all predictions, so that whatever is compiled for a size is compiled at most 64
    times. The padding repeats a prediction without a weight.
    """
    flat = weight.flatten()
    found = flat.nonzero().flatten()
    unit = 16 * -(-len(flat) // (64 * 16))
    size = min(-(-max(len(found), 1) // unit) * unit, len(flat))
    if size == len(found):
        return found
    weightless = (flat == 0).nonzero()[0]
    return torch.cat([found, weightless.expand(size - len(found))])


def diffusion_batch(
    tokens: NDArray[np.int64],
    noise: Noise,
    mask_id: int,
    streams: Streams,
    documents: NDArray[np.int64] | None = None,
) -> Batch:
    """Batch of the diffusion objective from clean rows ``[b, L]`` and their noise (objective, steps 3 and 4).

    ``documents`` ``[b, L]``, never falling along a row, keeps attention inside them.
    """
    clean = torch.from_numpy(tokens)
    masked = torch.from_numpy(noise.masked)  # [K, b, L]
    noisy = torch.where(masked, mask_id, clean).flatten(0, 1)
    labels = clean.expand(len(masked), -1, -1).flatten(0, 1)
    weight = torch.from_numpy(noise.weight).flatten(0, 1)
    ids = torch.cat([noisy, clean]) if streams.clean else noisy
    return Batch(ids, labels, weight, labels.numel(), _within_rows(documents))


def causal_batch(tokens: NDArray[np.int64], documents: NDArray[np.int64] | None = None) -> Batch:
    """Batch of the plain causal LM: position l predicts token l + 1, the last position nothing.

    With ``documents`` ``[b, L]`` the last position of a document predicts nothing either, because the next token is
    another document's. The divisor stays L - 1 per row all the same: did it count predictions, the loss would depend
    on how rows are dealt to micro-batches.
    """
    clean = torch.from_numpy(tokens)
    weight = torch.ones(clean.shape, dtype=torch.float32)
    weight[:, -1] = 0
    numbers = _within_rows(documents)
    if numbers is not None:
        weight[:, :-1] = (numbers[:, :-1] == numbers[:, 1:]).float()
    return Batch(clean, clean.roll(-1, dims=1), weight, clean.shape[0] * (clean.shape[1] - 1), numbers)


def _within_rows(documents: NDArray[np.int64] | None) -> Tensor | None:
    """Numbers that start at 0 in every row: only equality matters, and small ones fit int32."""
    return None if documents is None else torch.from_numpy((documents - documents[:, :1]).astype(np.int32))
