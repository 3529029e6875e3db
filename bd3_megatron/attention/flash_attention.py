"""Two-stream attention by FlashAttention-4 (``flash_attn.cute``): block-sparse kernels for Hopper and Blackwell.

The kernels take the predicate as a function of indices in the CuTe language, and lists of tiles for each pass. Without
the lists of the backward pass gradients are silently wrong; both are always given here.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bd3_megatron.attention.mask import sees, within_documents
from bd3_megatron.attention.tiles import TILE, Call, Lists, PerDocuments, Side, device_lists, document_lists

_per_documents = PerDocuments()


def attend(query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float, documents: Tensor | None) -> Tensor:
    """Attention of a call's queries ``[q, b, n, d]`` over its keys ``[k, b, g, d]``, in bf16 or fp16 on CUDA."""
    from flash_attn.cute import flash_attn_func

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


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Plain causal attention by the same package, ``[l, b, n, d]``: what benchmarks compare with."""
    from flash_attn.cute import flash_attn_func

    return flash_attn_func(*(x.transpose(0, 1) for x in (query, key, value)), causal=True)[0].transpose(0, 1)


def tile_of(device: torch.device) -> tuple[int, int]:
    """Queries and keys of a tile: on Blackwell a block of the forward pass takes two tiles of queries at a time."""
    return (2 * TILE if torch.cuda.get_device_capability(device)[0] >= 10 else TILE), TILE


def block_sparse(lists: Lists, tile: tuple[int, int]) -> Any:
    """Lists of one pass in the package's type; ``block_size`` is queries, then keys, for both passes."""
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

    The package compiles one kernel per predicate, and caches it on disk if FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1.
    Its key is ``__cute_hash__``, which must therefore be the same in every process.
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
