"""Two-stream attention by FlashAttention-4 (``flash_attn.cute``): block-sparse kernels for Hopper and Blackwell.

The kernels take the predicate as a function of indices, in the CuTe language, and lists of tiles for either pass.
Without the lists of the backward pass its gradients are wrong and nothing says so; both are always given here.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.mask import Streams, sees, within_documents
from bd3_megatron.attention.tiles import (
    TILE,
    Call,
    Lists,
    PerDocuments,
    Side,
    device_lists,
    document_lists,
    keys_of_call,
)

_per_documents = PerDocuments()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    streams: Streams,
    scale: float | None = None,
    context: ContextShard | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Attention of every stream; shapes as :func:`bd3_megatron.attention.reference.attend`.

    bf16 and fp16 on CUDA. What it refuses is in :mod:`bd3_megatron.attention.limits` and :func:`device_refusal`.
    """
    from flash_attn.cute import flash_attn_func

    call = Call.of(streams, len(query), context)
    key, value = (keys_of_call(x, streams, context) for x in (key, value))
    tile = tile_of(query.device)
    if documents is None:
        tiles, aux = device_lists(call, tile, query.device), None
    else:
        tiles, aux = _per_documents.get(documents, document_lists, call, tile), [documents]
    forward, backward = (block_sparse(lists, tile) for lists in tiles)
    out, _ = flash_attn_func(
        *(x.transpose(0, 1) for x in (query, key, value)),  # [b, l, n, d], no copy: the kernels take strides
        softmax_scale=scale,
        # Packed heads would share a tile of queries, and gain nothing where rows are long.
        pack_gqa=False,
        mask_mod=mask_mod(call, documents is not None),
        aux_tensors=aux,
        block_sparse_tensors=forward,
        block_sparse_tensors_bwd=backward,
    )
    return out.transpose(0, 1)


def tile_of(device: torch.device) -> tuple[int, int]:
    """Queries and keys of a tile: on Blackwell a block of the forward pass takes two tiles of queries at a time."""
    return (2 * TILE if torch.cuda.get_device_capability(device)[0] >= 10 else TILE), TILE


def block_sparse(lists: Lists, tile: tuple[int, int]) -> Any:
    """Lists of either pass as the package takes them; sizes of queries and keys in this order for both."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return BlockSparseTensorsTorch(
        mask_block_cnt=lists.partial_count,
        mask_block_idx=lists.partial,
        full_block_cnt=lists.full_count,
        full_block_idx=lists.full,
        block_size=tile,
    )


@lru_cache(maxsize=64)
def mask_mod(call: Call, documents: bool) -> Callable[..., Any]:
    """The predicate of a call in CuTe: ``(row, head, query, key, lengths, tensors) -> Boolean`` of one element.

    The package compiles a kernel for each, and keeps it on disk too if FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1. It
    knows them by ``__cute_hash__``, which therefore must be the same in every process.
    """
    from cutlass import Boolean, Int32
    from flash_attn.cute.utils import scalar_to_ssa

    def where(condition: Any, then: Any, otherwise: Any) -> Any:
        return otherwise + Int32(condition) * (then - otherwise)

    def seen(row: Any, head: Any, query: Any, key: Any, lengths: Any, tensors: Any) -> Any:
        result = call.sees(query[0], key[0], where)
        if documents:
            numbers = tensors[0]
            _, at = call.queries.locate(query[0], where)
            _, other = call.keys.locate(key[0], where)
            result = within_documents(result, numbers[row[0], at], numbers[row[0], other])
        return scalar_to_ssa(Boolean(result), Boolean)

    parts = (mask_mod.__wrapped__, Call.sees, Side.locate, sees, within_documents)
    text = "".join(inspect.getsource(part) for part in parts)
    seen.__cute_hash__ = hashlib.sha256(f"{text}{call}{documents}".encode()).hexdigest()
    return seen


def device_refusal(device: torch.device) -> str | None:
    """Why this cannot run on ``device``, or None."""
    needed = "needs a CUDA device of compute capability 9.0 or newer, found"
    if device.type != "cuda":
        return f"{needed} none"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return f"{needed} {major}.{minor}"
    if major >= 12:
        return f"compute capability {major}.{minor} has no block-sparse backward pass"
    return package_refusal()


@lru_cache(maxsize=1)
def package_refusal() -> str | None:
    """Why the package cannot be used, or None. flash-attn 2 has the same name and not these kernels."""
    try:
        importlib.import_module("flash_attn.cute")
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        return f"needs the package flash-attn-4, which cannot be imported ({reason})"
    return None
