"""SDPA with the dense mask of all streams, for comparison: memory is quadratic in the streams."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bd3_megatron.attention.backends import AttentionBackend

if TYPE_CHECKING:
    from torch import Tensor


class Reference(AttentionBackend):
    """SDPA with the dense mask, which every other backend is tested against."""

    name = "reference"
    uncounted = "its dense masks"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None) -> Tensor:
        import torch.nn.functional as F

        from bd3_megatron.attention.mask import dense_mask

        streams, context = self.streams, self.context
        repeats = query.shape[2] // key.shape[2]
        mask = dense_mask(streams, query.device, documents)
        if context.size > 1:
            mask = context.take(mask.unflatten(-2, (streams.count, -1)), -2).flatten(-3, -2)
        mask = mask[..., : len(query), :]  # [q, N], b of them with documents
        mask = mask if documents is None else mask[:, None]
        key, value = (context.gather_streams(x) for x in (key, value))  # [N, b, g, d]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, tokens, d]
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).permute(2, 0, 1, 3)
