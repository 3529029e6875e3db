"""FlexAttention of torch over lists of tiles, compiled; on CPU a dense mask, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from bd3_megatron.attention.backends import AttentionBackend, Demand

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SMALLEST_HEAD = 16


class Flex(AttentionBackend):
    """FlexAttention; the computation is in :mod:`bd3_megatron.attention.flex_attention`."""

    name = "flex"
    priority: ClassVar[Mapping[str, int]] = {"cuda": 20}

    @classmethod
    def missing_reason(cls, demand: Demand, device: torch.device) -> str | None:
        if device.type == "cuda" and demand.head_dim < _SMALLEST_HEAD:
            return f"takes heads of {_SMALLEST_HEAD} or more on CUDA, not {demand.head_dim}"
        return None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None) -> Tensor:
        from bd3_megatron.attention import flex_attention, tiles

        call, key, value = tiles.prepare(query, key, value, self.streams, self.context)
        return flex_attention.attend(query, key, value, call, scale, documents)

    @classmethod
    def causal(cls, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from bd3_megatron.attention import flex_attention, mask, tiles

        call = tiles.Call.of(mask.Streams(len(query), block_size=1, noisy=0, clean=len(query)), len(query))
        return flex_attention.attend(query, key, value, call, query.shape[-1] ** -0.5, None)
