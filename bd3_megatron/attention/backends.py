"""The attention backends by name, and which of them a run gets.

:func:`choose` is what a model calls when it is built::

    backend = choose(kernels.attention, streams, context, head_dim=128, dtype=torch.bfloat16, device=device)
    out = backend.attend(query, key, value, streams, scale, context, documents)

What the configuration alone rules out is refused earlier, by :func:`bd3_megatron.attention.limits.check_kernels`.
Streams whose clean one ends early should be cut at a multiple of :data:`bd3_megatron.attention.limits.TILE`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.attention import chunked, flex, reference
from bd3_megatron.attention.context import ContextShard
from bd3_megatron.attention.limits import NAMES, Demand, refusal, refused
from bd3_megatron.attention.mask import Streams

Attend = Callable[[Tensor, Tensor, Tensor, Streams, float | None, ContextShard | None, Tensor | None], Tensor]

# Those that compute on CPU, gradients included.
BACKENDS: dict[str, Attend] = {"reference": reference.attend, "chunked": chunked.attend, "flex": flex.attend}

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Backend:
    """A backend that can do what was asked of it.

    Attributes:
        name: flash, flex, chunked or reference.
        attend: as :func:`bd3_megatron.attention.reference.attend`.
    """

    name: str
    attend: Attend


def choose(
    name: str,
    streams: Streams,
    context: ContextShard | None,
    *,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Backend:
    """The backend of that name; ``auto`` takes the fastest that can do this here.

    Args:
        name: auto, flash, flex, chunked or reference.
        streams: what the model computes with.
        context: this rank's share of the positions; None for all.
        head_dim, dtype: of queries, keys and values.
        device: on which they are.

    Raises:
        ConfigError: the backend of that name cannot do this; one line with the reason and what would do.
    """
    piece = streams.length if context is None else context.chunk
    demand = Demand(PRECISIONS[dtype], head_dim, piece, streams.clean)
    if name == "auto":
        preferred = NAMES[:-1] if device.type == "cuda" else ("chunked",)
        name = next(other for other in preferred if not cannot(other, demand, device))
    elif reason := cannot(name, demand, device):
        raise refused(name, reason, [other for other in NAMES[:-1] if not cannot(other, demand, device)])
    if name in BACKENDS:
        return Backend(name, BACKENDS[name])
    return Backend(name, importlib.import_module(f"bd3_megatron.attention.{name}").attend)


def cannot(name: str, demand: Demand, device: torch.device) -> str | None:
    """Why the backend cannot do this on this device, or None."""
    if name == "flash":
        from bd3_megatron.attention import flash

        if reason := flash.device_refusal(device):
            return reason
    if name == "flex" and device.type == "cuda" and demand.head_dim < 16:
        return f"takes heads of 16 or more on CUDA, not {demand.head_dim}"
    return refusal(name, demand)
