"""Qwen2: RMSNorm, SwiGLU, biases of queries, keys and values, no norms of them."""

from __future__ import annotations

from typing import ClassVar

from bd3_megatron.backbones import Backbone, Traits


class Qwen2(Backbone):
    """The dense Qwen2 and Qwen2.5 models' layers (arXiv 2407.10671)."""

    traits: ClassVar[Traits] = Traits(qkv_bias=True)
