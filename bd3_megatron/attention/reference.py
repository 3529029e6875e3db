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
        query: ``[l, count * b, n, d]``, streams stacked on the batch axis as :class:`Streams` says; l is L, or this
            rank's share of it.
        key, value: ``[l, count * b, g, d]`` with ``g`` dividing ``n`` (grouped queries).
        scale: factor on the logits; ``1 / sqrt(d)`` when None.
        context: which positions this rank holds; None for all.
        documents: int ``[b, L]``, the document of each position of the whole rows, never falling along a row: a query
            sees keys of its own document only. None lets a row be one document.

    Returns:
        ``[l, count * b, n, d]``.
    """
    context = context or ContextShard(len(query))
    _, rows, heads, width = query.shape
    count, batch = streams.count, rows // streams.count

    def end_to_end(x: Tensor) -> Tensor:  # [l, S b, n, d] -> [b, n, S l, d]
        x = x.repeat_interleave(heads // x.shape[2], dim=2)
        return x.view(-1, count, batch, heads, width).permute(2, 3, 1, 0, 4).reshape(batch, heads, -1, width)

    mask = dense_mask(context.length, streams, query.device, documents)
    mask = context.take(mask.unflatten(-2, (count, -1)), -2).flatten(-3, -2)  # [S l, S L], b of them with documents
    out = F.scaled_dot_product_attention(
        end_to_end(query),
        end_to_end(context.gather(key)),
        end_to_end(context.gather(value)),
        attn_mask=mask if documents is None else mask[:, None],
        scale=scale,
    )
    out = out.view(batch, heads, count, -1, width)
    return out.permute(3, 2, 0, 1, 4).reshape(query.shape)
