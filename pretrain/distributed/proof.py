"""Proof of the session's key over the connections of a process group, before the first message on them."""

from __future__ import annotations

import hmac
import os
import socket

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_common.errors import ConfigError
from pretrain.distributed.messages import device_of

_BYTES = 32


def prove_membership(key: bytes) -> None:
    """Challenge all ranks of the default group, and answer theirs: each shows that it knows the key.

    A process that connects to a rank's socket without the key cannot answer: an answer covers the rank's number, the
    size of the world, and fresh nonces of all ranks.

    Raises:
        ConfigError: a rank has not proved itself.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = os.urandom(_BYTES)
    nonces = _all_gather(mine)
    if nonces[rank] != mine:
        raise ConfigError(_line([rank]))
    answers = _all_gather(_answer(key, rank, nonces))
    wrong = [n for n in range(size) if not hmac.compare_digest(answers[n], _answer(key, n, nonces))]
    if wrong:
        raise ConfigError(_line(wrong))


def _answer(key: bytes, rank: int, nonces: list[bytes]) -> bytes:
    return hmac.digest(key, b"rank %d of %d: %s" % (rank, len(nonces), b"".join(nonces)), "sha256")


def _all_gather(value: bytes) -> list[bytes]:
    mine = torch.frombuffer(bytearray(value), dtype=torch.uint8).to(device_of())
    parts: list[Tensor] = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return [bytes(part.cpu().numpy()) for part in parts]


def _line(ranks: list[int]) -> str:
    named = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}"
    return (
        f"{named}: did not prove the job's secret on the connections of {socket.gethostname()}; another process takes "
        "part in the job: start it again with another port"
    )
