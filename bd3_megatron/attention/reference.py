"""Two-stream attention with the dense mask: quadratic in the number of streams, and plainly right."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.mask import Streams, dense_mask


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    streams: Streams,
    scale: float | None = None,
    context: ContextShard | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Attention of every stream under the dense mask.

    Args:
        query: ``[q, b, n, d]``, streams laid end to end as :class:`Streams` says, each with all its positions or
            this rank's share of them; those of the noisy streams alone where nobody needs what the clean ones give.
        key, value: ``[k, b, g, d]`` of all streams, with ``g`` dividing ``n`` (grouped queries).
        scale: factor on the logits; ``1 / sqrt(d)`` when None.
        context: which positions this rank holds; None for all.
        documents: int ``[b, L]``, the document of each position of the whole rows, never falling along a row: a query
            sees keys of its own document only. None lets a row be one document.

    Returns:
        ``[q, b, n, d]``.
    """
    context = context or ContextShard(streams.length)
    repeats = query.shape[2] // key.shape[2]

    def whole(x: Tensor) -> Tensor:  # [k, b, g, d] -> [N, b, g, d]
        if context.size == 1:
            return x
        by_position = x.unflatten(0, (-1, context.held)).transpose(0, 1)  # [l, S, b, g, d]
        return context.gather(by_position).transpose(0, 1).flatten(0, 1)

    def heads_first(x: Tensor) -> Tensor:  # [l, b, n, d] -> [b, n, l, d]
        return x.permute(1, 2, 0, 3)

    mask = dense_mask(streams, query.device, documents)
    if context.size > 1:
        mask = context.take(mask.unflatten(-2, (streams.count, -1)), -2).flatten(-3, -2)
    mask = mask[..., : len(query), :]  # [q, N], b of them with documents
    out = F.scaled_dot_product_attention(
        heads_first(query),
        heads_first(whole(key)).repeat_interleave(repeats, 1),
        heads_first(whole(value)).repeat_interleave(repeats, 1),
        attn_mask=mask if documents is None else mask[:, None],
        scale=scale,
    )
    return out.permute(2, 0, 1, 3)
