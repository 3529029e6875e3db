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
        input_ids: int64 ``[S b, L]``, the streams stacked as :class:`Streams` says.
        labels: int64 ``[R, L]``, what position l of the first R rows of ``input_ids`` predicts; R is K b for the
            diffusion objective and b for the causal one.
        weight: float32 ``[R, L]``, weight of each prediction's nll, zero where there is none.
        tokens: what the sum of weighted nll is divided by for the training loss (objective, step 6): L per row for
            the diffusion objective (BOS counted), L - 1 for the causal one.
    """

    input_ids: Tensor
    labels: Tensor
    weight: Tensor
    tokens: int

    def take(self, context: ContextShard) -> Batch:
        """The positions that one context-parallel rank holds; ``tokens`` stays that of the whole rows."""
        ids, labels, weight = (context.take(x, 1) for x in (self.input_ids, self.labels, self.weight))
        return Batch(ids, labels, weight, self.tokens)

    def to(self, device: torch.device) -> Batch:
        ids, labels, weight = (x.to(device, non_blocking=True) for x in (self.input_ids, self.labels, self.weight))
        return Batch(ids, labels, weight, self.tokens)


def diffusion_batch(tokens: NDArray[np.int64], noise: Noise, mask_id: int, streams: Streams) -> Batch:
    """Batch of the diffusion objective from clean rows ``[b, L]`` and their noise (objective, steps 3 and 4)."""
    clean = torch.from_numpy(tokens)
    masked = torch.from_numpy(noise.masked)  # [K, b, L]
    noisy = torch.where(masked, mask_id, clean).flatten(0, 1)
    labels = clean.expand(len(masked), -1, -1).flatten(0, 1)
    weight = torch.from_numpy(noise.weight).flatten(0, 1)
    ids = torch.cat([noisy, clean]) if streams.clean else noisy
    return Batch(ids, labels, weight, tokens=labels.numel())


def causal_batch(tokens: NDArray[np.int64]) -> Batch:
    """Batch of the plain causal LM: position l predicts token l + 1, the last position nothing."""
    clean = torch.from_numpy(tokens)
    weight = torch.ones(clean.shape, dtype=torch.float32)
    weight[:, -1] = 0
    return Batch(clean, clean.roll(-1, dims=1), weight, tokens=clean.shape[0] * (clean.shape[1] - 1))
