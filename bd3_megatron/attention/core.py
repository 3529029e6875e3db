"""Megatron's core attention on top of an attention backend, with a block cache for sampling."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from bd3_megatron.attention.backends import AttentionBackend


class BlockCache:
    """Keys and values of the clean blocks before the current one, for one layer; each ``[l, b, g, d]``."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.append = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one block to itself and the cached blocks; with ``append`` the block is cached too.

        A block sees all of itself and all blocks before it, noisy or clean, so that no mask is needed.
        """
        if self.key is not None and self.value is not None:
            key, value = torch.cat([self.key, key]), torch.cat([self.value, value])
        if self.append:
            self.key, self.value = key, value
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, n, l, d]
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).permute(2, 0, 1, 3)


class TwoStreamAttention(MegatronModule):
    """Megatron ``core_attention``: the only module that knows about the two streams.

    The mask is a property of the objective, so that Megatron's ``attention_mask`` is free to carry the documents of
    packed rows ``[b, L]``: Megatron passes it on unchanged, to recomputed layers too.

    Args:
        backend: attention of the model's streams, shared by all layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object = None,
        attention_type: str | None = None,
        softmax_scale: float | None = None,
        *,
        backend: AttentionBackend,
        **_: object,
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.backend = backend
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.cache: BlockCache | None = None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> Tensor:
        """``[q, b, n, d]`` queries, ``[k, b, g, d]`` keys and values -> ``[q, b, n d]``.

        The k tokens are those of all streams at this context-parallel rank's positions; the q tokens are the same, or
        those of the noisy streams in the last layer. ``attention_mask`` is None or int ``[b, L]``, the document of each
        position of the whole rows. With a cache all tokens belong to one document.
        """
        if self.cache is not None:
            out = self.cache.attend(query, key, value, self.scale)
        else:
            out = self.backend.attend(query, key, value, self.scale, attention_mask)
        return out.flatten(2)
