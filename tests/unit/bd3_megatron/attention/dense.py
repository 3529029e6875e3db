"""Backends called without a model: by name, over some streams."""

from __future__ import annotations

from torch import Tensor

from bd3_megatron.attention.backends import ATTENTION_BACKENDS
from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.mask import Streams

# Those that compute on CPU, gradients included.
ON_CPU = sorted(set(ATTENTION_BACKENDS.names()) - {"flash"})
OTHERS = sorted(set(ON_CPU) - {"reference"})


def attend(
    name: str,
    qkv: list[Tensor],
    streams: Streams,
    scale: float | None = None,
    context: ContextShard | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Attention by the named backend; ``scale`` is ``1 / sqrt(d)`` when None."""
    query, key, value = qkv
    return ATTENTION_BACKENDS.load(name)(streams, context).attend(
        query, key, value, scale or query.shape[-1] ** -0.5, documents
    )


def reference(*qkv: Tensor, **options) -> Tensor:
    """Attention under the dense mask."""
    return attend("reference", list(qkv[:3]), *qkv[3:], **options)
