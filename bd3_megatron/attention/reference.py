"""Two-stream attention with the dense mask: quadratic in the number of streams, and plainly right."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bd3_megatron.attention.mask import Streams, dense_mask


def attend(query: Tensor, key: Tensor, value: Tensor, streams: Streams, scale: float | None = None) -> Tensor:
    """Attention of every stream under the dense mask.

    Args:
        query: ``[L, count * b, n, d]``, streams stacked on the batch axis as :class:`Streams` says.
        key, value: ``[L, count * b, g, d]`` with ``g`` dividing ``n`` (grouped queries).
        scale: factor on the logits; ``1 / sqrt(d)`` when None.

    Returns:
        ``[L, count * b, n, d]``.
    """
    length, rows, heads, width = query.shape
    count, batch = streams.count, rows // streams.count

    def end_to_end(x: Tensor) -> Tensor:  # [L, S b, n, d] -> [b, n, S L, d]
        x = x.repeat_interleave(heads // x.shape[2], dim=2)
        return x.view(length, count, batch, heads, width).permute(2, 3, 1, 0, 4).reshape(batch, heads, -1, width)

    out = F.scaled_dot_product_attention(
        end_to_end(query),
        end_to_end(key),
        end_to_end(value),
        attn_mask=dense_mask(length, streams, query.device),
        scale=scale,
    )
    out = out.view(batch, heads, count, length, width)
    return out.permute(3, 2, 0, 1, 4).reshape(length, rows, heads, width)
