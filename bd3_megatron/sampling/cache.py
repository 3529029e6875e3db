"""Forward passes on one block at a time, with the keys and values of the finished blocks cached."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from bd3_megatron.attention.core import BlockCache, TwoStreamAttention
from bd3_megatron.model import BlockDiffusionModel


class BlockForward:
    """The model's forward pass on one block, after the clean blocks so far.

    A block sees itself and every cached block, as the noisy stream does in training, so these logits equal those of the
    two-stream forward pass.

    Raises:
        ValueError: the model is not on a single pipeline stage.
    """

    def __init__(self, model: BlockDiffusionModel):
        if not (model.pre_process and model.post_process):
            raise ValueError("sampling needs the whole model on one pipeline stage")
        self.model = model
        self.length = 0
        self._attentions = [m for m in model.modules() if isinstance(m, TwoStreamAttention)]
        self._caches = [BlockCache() for _ in self._attentions]

    @contextlib.contextmanager
    def _cached(self, append: bool) -> Iterator[None]:
        for attention, cache in zip(self._attentions, self._caches):
            cache.append = append
            attention.cache = cache
        try:
            yield
        finally:
            for attention in self._attentions:
                attention.cache = None

    @torch.no_grad()
    def logits(self, block: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Logits of a (noisy) block of ids ``[b, l]`` in fp32, -inf for the mask token.

        Args:
            chosen: the positions to predict, bool ``[b, l]``; no others reach the head. None: all.

        Returns:
            ``[n, V]`` for the n chosen positions in row-major order; ``[b, l, V]`` for None.
        """
        self.model.eval()
        with self._cached(append=False):
            hidden = self.model.block_states(block, self.length).transpose(0, 1)  # [b, l, h]
        logits = self.model.logits(hidden if chosen is None else hidden[chosen])
        return gather_from_tensor_model_parallel_region(logits)[..., : self.model.model.vocab_size].float()

    @torch.no_grad()
    def append(self, block: Tensor) -> None:
        """Run a finished clean block ``[b, l]`` once and keep its keys and values."""
        self.model.eval()
        with self._cached(append=True):
            self.model.block_states(block, self.length)
        self.length += block.shape[1]
