"""Llama: RMSNorm, SwiGLU, no norms of queries and keys, no biases."""

from __future__ import annotations

from typing import ClassVar

from bd3_megatron.backbones import Backbone, Traits


class Llama(Backbone):
    """The Llama models' layers (arXiv 2302.13971, grouped queries of arXiv 2307.09288)."""

    traits: ClassVar[Traits] = Traits()
    norm_eps: ClassVar[float] = 1e-5

    def default_ffn(self, hidden: int) -> int:
        """8/3 of the hidden width, which gives a gated MLP the weights of an ungated one of 4, rounded up to 256."""
        return -(-8 * hidden // (3 * 256)) * 256
