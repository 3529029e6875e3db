"""Collectives that propagate exceptions: if one rank fails, all raise.

A rank that raises alone leaves the others waiting in their next collective. So whatever can fail on one rank only (a
disk, a file, a folder) runs in :func:`on_rank_0`, :func:`gather_from_ranks` or :func:`raise_on_all_ranks`.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pretrain.distributed.collective_errors import mark_collective

T = TypeVar("T")

_BROKEN = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Timed out waiting \d+ms")
# Torch's errors of NCCL and of the rendezvous store; gloo raises a plain RuntimeError.
_NETWORK = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)


class LostRank(SystemExit):
    """The connection to another rank broke, and this one cannot go on: one line on stderr, exit code 1."""


@contextlib.contextmanager
def lost_ranks(rank: int, phase: Callable[[], str]) -> Iterator[None]:
    """Turn the error of a torch backend whose connection broke into :class:`LostRank`.

    Args:
        phase: returns the place in the run, as in ``in step 12``.
    """
    try:
        yield
    except RuntimeError as error:
        known = _BROKEN.search(str(error))
        if known is None and not isinstance(error, _NETWORK):
            raise
        reason = known[0] if known else " ".join(str(error).split())[:200]
        raise LostRank(
            f"rank {rank}: lost another rank {phase()} ({reason}); "
            f"start the job again to go on from its last checkpoint"
        ) from error


def on_rank_0(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call ``function`` on rank 0 and broadcast its result; its error is raised on every rank."""
    shared: list[Any] = [_outcome(function)] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(shared, src=0, group=group)
    return _result(shared[0])


def gather_from_ranks(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """All-gather the results of ``function``, by rank; the error of the first rank that fails is raised on all."""
    return [_result(outcome) for outcome in gather_outcomes(function, group)]


def gather_outcomes(
    function: Callable[[], T], group: dist.ProcessGroup | None = None
) -> list[tuple[T | None, Exception | None]]:
    """All-gather (result, error) of ``function``, by rank; nothing is raised."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _outcome(function), group=group)
    return found


def raise_on_all_ranks(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call ``function`` on every rank and return its own result; the error of the first that fails is raised on all."""
    result, error = _outcome(function)
    gather_from_ranks(lambda: _result((None, error)), group)
    return result


def max_over_ranks(numbers: Sequence[int], device: torch.device) -> list[int]:
    """Elementwise maximum of ``numbers`` over all ranks, by one all-reduce."""
    shared = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.tolist()


def _outcome(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return None, error


def _result(outcome: tuple[T, Exception | None]) -> T:
    result, error = outcome
    if error is not None:
        raise mark_collective(error)
    return result
