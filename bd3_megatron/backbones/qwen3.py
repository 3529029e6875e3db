"""Qwen3: RMSNorm, SwiGLU, norms of queries and keys by head, no biases."""

from __future__ import annotations

from typing import ClassVar

from bd3_megatron.backbones import Backbone, Traits


class Qwen3(Backbone):
    """The dense Qwen3 models' layers (arXiv 2505.09388), which serving engines load."""

    traits: ClassVar[Traits] = Traits(qk_norm=True)
