"""DiT: LayerNorm, ungated tanh-GELU MLP, biases in MLP and head."""

from __future__ import annotations

from typing import ClassVar

from bd3_megatron.backbones import Backbone, Traits


class DiT(Backbone):
    """The paper's backbone (arXiv 2503.09573), its constant adaLN condition folded into norms and output layers."""

    traits: ClassVar[Traits] = Traits(
        norm="LayerNorm", activation="gelu_tanh", gated=False, mlp_bias=True, head_bias=True
    )
    norm_eps = 1e-5
    grouped_queries = may_tie = False
    zero_head = True

    def default_ffn(self, hidden: int) -> int:
        return 4 * hidden
