"""What all ranks come to know together: results, and failures that every rank then raises at the same place.

A rank that fails alone leaves the others waiting in their next collective. Whatever can fail on one rank only (a disk,
a file, a folder) therefore runs in :func:`on_first`, :func:`on_each` or :func:`together`.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)


_BROKEN = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Timed out waiting \d+ms")


# What torch raises of NCCL and of the rendezvous store; gloo raises a plain RuntimeError.
_NETWORK = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)


class LostRank(SystemExit):
    """Another rank is gone, and this one cannot go on alone: one line on stderr, exit code 1."""


@contextlib.contextmanager
def lost_ranks(rank: int, place: Callable[[], str]) -> Iterator[None]:
    """Turn what torch's backends raise when a connection breaks into :class:`LostRank`.

    Args:
        place: says where in the run this happened.
    """
    try:
        yield
    except RuntimeError as error:
        known = _BROKEN.search(str(error))
        if known is None and not isinstance(error, _NETWORK):
            raise
        reason = known[0] if known else " ".join(str(error).split())[:200]
        raise LostRank(
            f"rank {rank}: lost another rank {place()} ({reason}); "
            f"start the job again to go on from its last checkpoint"
        ) from error


def everywhere(error: E) -> E:
    """Mark an error that every rank raises alike, so that only the first rank prints it."""
    error.everywhere = True
    return error


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """What is raised inside depends on the configuration only: every rank raises it (see :func:`everywhere`)."""
    try:
        yield
    except Exception as error:
        everywhere(error)
        raise


def on_first(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """The result of ``function``, called on rank 0 only, on every rank; its error, too, is raised on every rank."""
    shared: list[Any] = [_outcome(function)] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(shared, src=0, group=group)
    return _result(shared[0])


def on_each(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Results of ``function`` by rank, on every rank; the first failing rank's error is raised on every rank."""
    return [_result(outcome) for outcome in outcomes(function, group)]


def outcomes(
    function: Callable[[], T], group: dist.ProcessGroup | None = None
) -> list[tuple[T | None, Exception | None]]:
    """(result, error) of ``function`` by rank, on every rank; nothing is raised."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _outcome(function), group=group)
    return found


def together(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """This rank's own result of ``function``; the first failing rank's error is raised on every rank."""
    result, error = _outcome(function)
    on_each(lambda: _result((None, error)), group)
    return result


def highest(numbers: Sequence[int], device: torch.device) -> list[int]:
    """The highest of all ranks' numbers, at each place; one small collective over all ranks."""
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
        raise everywhere(error)
    return result
