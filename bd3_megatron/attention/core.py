"""Megatron's core attention on top of the two-stream backends, with a block cache for sampling."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from bd3_megatron.attention import chunked, reference
from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.mask import Streams

Backend = Callable[[Tensor, Tensor, Tensor, Streams, float | None, ContextShard | None, Tensor | None], Tensor]

BACKENDS: dict[str, Backend] = {"chunked": chunked.attend, "reference": reference.attend}


def choose_backend(name: str) -> Backend:
    """The backend of that name; ``auto`` takes the fastest that this device can run."""
    return BACKENDS["chunked" if name == "auto" else name]


class BlockCache:
    """Keys and values of the clean blocks before the current one, for one layer; each ``[l, b, g, d]``."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.append = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one block to itself and the cached blocks; with ``append`` the block joins them.

        A block sees all of itself and all before it, noisy or clean, so there is no mask.
        """
        if self.key is not None:
            key, value = torch.cat([self.key, key]), torch.cat([self.value, value])
        if self.append:
            self.key, self.value = key, value
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, l, d]
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).permute(2, 0, 1, 3)


class TwoStreamAttention(MegatronModule):
    """Megatron ``core_attention``: the only module that knows about the two streams.

    The mask is a property of the objective. Where rows hold several documents, Megatron's ``attention_mask`` brings
    their numbers ``[b, L]``: Megatron hands it on as it is, to layers that are computed again too.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type=None,
        attention_type: str | None = None,
        softmax_scale: float | None = None,
        *,
        streams: Streams,
        context: ContextShard,
        backend: str = "auto",
        **_: object,
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.streams = streams
        self.context = context
        self.backend = choose_backend(backend)
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.cache: BlockCache | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **_) -> Tensor:
        """``[q, b, n, d]`` queries, ``[k, b, g, d]`` keys and values -> ``[q, b, n d]``.

        k tokens are all streams', with the positions that this context-parallel rank holds; q are as many, or in the
        last layer those of the noisy streams. ``attention_mask`` is None or int ``[b, L]``, the document of each
        position of the whole rows; what is sampled with a cache is one document.
        """
        if self.cache is not None:
            out = self.cache.attend(query, key, value, self.scale)
        else:
            out = self.backend(query, key, value, self.streams, self.scale, self.context, attention_mask)
        return out.flatten(2)
