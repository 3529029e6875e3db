"""FlashAttention-4 over lists of tiles: Hopper and Blackwell, bf16 and fp16, heads of 64 or 128."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from bd3_megatron.attention.backends import AttentionBackend, Demand
from bd3_megatron.attention.lengths import TILE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_HEAD_DIMS = (64, 128)  # those that its kernels were checked with


class Flash(AttentionBackend):
    """FlashAttention-4 (``flash_attn.cute``); the computation is in :mod:`bd3_megatron.attention.flash_attention`."""

    name = "flash"
    priority: ClassVar[Mapping[str, int]] = {"cuda": 30}
    multiple = TILE

    @classmethod
    def unsupported_reason(cls, demand: Demand) -> str | None:
        if demand.precision not in ("bf16", "fp16"):
            return f"takes bf16 and fp16, not {demand.precision}"
        if demand.head_dim not in _HEAD_DIMS:
            return f"takes heads of {' or '.join(map(str, _HEAD_DIMS))}, not {demand.head_dim}"
        return super().unsupported_reason(demand)

    @classmethod
    def missing_reason(cls, demand: Demand, device: torch.device) -> str | None:
        import torch

        needed = "needs a CUDA device of compute capability 9.0 or newer, found"
        if device.type != "cuda":
            return f"{needed} none"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 9:
            return f"{needed} {major}.{minor}"
        if major >= 12:
            return f"compute capability {major}.{minor} has no block-sparse backward pass"
        return package_reason()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None) -> Tensor:
        from bd3_megatron.attention import flash_attention, tiles

        call, key, value = tiles.prepare(query, key, value, self.streams, self.context)
        return flash_attention.attend(query, key, value, call, scale, documents)

    @classmethod
    def causal(cls, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from bd3_megatron.attention import flash_attention

        return flash_attention.causal(query, key, value)


@lru_cache(maxsize=1)
def package_reason() -> str | None:
    """Reason why the package cannot be used, or None. flash-attn 2 has the same name and lacks these kernels."""
    try:
        importlib.import_module("flash_attn.cute")
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        return f"needs the package flash-attn-4, which cannot be imported ({reason}; pip install 'bd3-megatron[gpu]')"
    return None
