"""Collectives of values: each is sent as a message of :mod:`pretrain.distributed.codec` in a tensor of bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.distributed import codec


def all_gather_values(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """All-gather a value of every rank of ``group``, by rank.

    Raises:
        TypeError: the codec cannot encode it; then nothing has been sent.
        MessageError: another rank sent something else than a message.
    """
    return all_gather_messages(codec.encode(value), group)


def all_gather_messages(message: bytes, group: dist.ProcessGroup | None = None) -> list[Any]:
    """All-gather encoded values and decode them, by rank; errors as in :func:`all_gather_values`."""
    device, size = device_of(group), dist.get_world_size(group)
    if size == 1:
        return [codec.decode(message)]
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(message)], dtype=torch.int64, device=device), group=group)
    counts = [_length(length) for length in lengths]
    padded = torch.zeros(max(counts), dtype=torch.uint8, device=device)
    padded[: len(message)] = _tensor(message)
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded, group=group)
    return [_decode(part[:count]) for part, count in zip(parts, counts)]


def broadcast_message(message: bytes | None, source: int = 0, group: dist.ProcessGroup | None = None) -> Any:
    """Broadcast the encoded value of the global rank ``source`` and decode it; None on the other ranks.

    Raises:
        MessageError: the source sent something else than a message.
    """
    device = device_of(group)
    if message is not None and dist.get_world_size(group) == 1:
        return codec.decode(message)
    length = torch.tensor([0 if message is None else len(message)], dtype=torch.int64, device=device)
    dist.broadcast(length, source, group=group)
    count = _length(length)
    data = torch.empty(count, dtype=torch.uint8, device=device) if message is None else _tensor(message).to(device)
    dist.broadcast(data, source, group=group)
    return _decode(data)


def device_of(group: dist.ProcessGroup | None = None) -> torch.device:
    """Device of the tensors that the group's backend sends."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    )


def _tensor(message: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(message), np.uint8))


def _decode(message: Tensor) -> Any:
    return codec.decode(memoryview(message.cpu().numpy()))


def _length(length: Tensor) -> int:
    count = int(length.item())
    if not 0 < count <= codec.MAX_MESSAGE:
        raise codec.MessageError(f"another rank announces a message of {count} bytes")
    return count
