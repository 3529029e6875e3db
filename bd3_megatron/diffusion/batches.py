"""Micro-batches: token ids that the model reads, labels and their weights."""

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
        labels: int64 ``[R, L]``, the token that each position of the first R rows of ``input_ids`` predicts; R is
            K b for the diffusion objective and b for the causal one.
        weight: float32 ``[R, L]``, weight of each prediction's nll, zero where nothing is predicted.
        tokens: divisor of the summed weighted nll in the training loss (docs/science.md, step 6): L per row for the
            diffusion objective (BOS counted), L - 1 for the causal one.
        documents: int32 ``[b, L]``, number of the document that each position belongs to; a query sees keys of its
            own document only. None: a query sees its whole row. The K draws of a row share its documents.
        predicted: int64 ``[P]``, ascending indices of the flattened ``[R L]`` predictions that have a weight, padded
            as :func:`predicted_positions` says. Made from ``weight`` if None.
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
        """The batch at the positions of one context-parallel rank.

        ``tokens`` and ``documents`` remain those of whole rows, because keys come from all ranks.
        """
        if context.size == 1:
            return self
        ids, labels, weight = (context.take(x, 1) for x in (self.input_ids, self.labels, self.weight))
        return Batch(ids, labels, weight, self.tokens, self.documents)

    def part(self, draws: int, rows: slice) -> Batch:
        """Some of the rows, with all their streams.

        Args:
            draws: K; 1 for the causal objective.
        """
        count = len(self.labels) // draws

        def cut(tensor: Tensor) -> Tensor:  # [S b, L]
            return tensor.view(-1, count, tensor.shape[1])[:, rows].flatten(0, 1)

        ids, labels, weight = cut(self.input_ids), cut(self.labels), cut(self.weight)
        documents = None if self.documents is None else self.documents[rows]
        return Batch(ids, labels, weight, self.tokens * len(labels) // len(self.labels), documents)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        documents = None if self.documents is None else move(self.documents)
        predicted = None if self.predicted is None else move(self.predicted)
        return Batch(move(self.input_ids), move(self.labels), move(self.weight), self.tokens, documents, predicted)


def predicted_positions(weight: Tensor) -> Tensor:
    """Flat indices ``[P]`` of the predictions that have a weight, padded so that few different sizes P occur.

    They are found where the batch is made, so that no GPU waits for a count. P is a multiple of 16 (8-bit matrix
    products need that) and of a 64th of all predictions: kernels compiled by shape are compiled at most 64 times. The
    padding repeats one prediction without a weight.
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
    """Batch of the diffusion objective from clean rows and their noise (docs/science.md, steps 3 and 4).

    Args:
        tokens: clean rows ``[b, L]``.
        documents: ``[b, L]``, never falling along a row; None: attention sees whole rows.
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

    Args:
        tokens: rows ``[b, L]``.
        documents: ``[b, L]``; the last position of a document predicts nothing either, since the next token belongs
            to another document. The divisor remains L - 1 per row: if it counted predictions, the loss would depend
            on how rows are split into micro-batches.
    """
    clean = torch.from_numpy(tokens)
    weight = torch.ones(clean.shape, dtype=torch.float32)
    weight[:, -1] = 0
    numbers = _within_rows(documents)
    if numbers is not None:
        weight[:, :-1] = (numbers[:, :-1] == numbers[:, 1:]).float()
    return Batch(clean, clean.roll(-1, dims=1), weight, clean.shape[0] * (clean.shape[1] - 1), numbers)


def _within_rows(documents: NDArray[np.int64] | None) -> Tensor | None:
    """Document numbers that start at 0 in every row: only equality matters, and small ones fit int32."""
    return None if documents is None else torch.from_numpy((documents - documents[:, :1]).astype(np.int32))
