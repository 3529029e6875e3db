"""Collectives that propagate exceptions: if one rank fails, all raise.

A rank that raises alone leaves the others waiting in their next collective. So whatever can fail on one rank only (a
disk, a file, a folder) runs in :func:`on_rank_0`, :func:`gather_from_ranks` or :func:`raise_on_all_ranks`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pretrain.distributed import codec
from pretrain.distributed.collective_errors import mark_collective
from pretrain.distributed.messages import all_gather_messages, broadcast_message, device_of

T = TypeVar("T")
Number = TypeVar("Number", np.int64, np.float64)
Outcome = tuple[T | None, Exception | None]

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
    """Call ``function`` on rank 0 and broadcast its result; its error is raised on every rank.

    The result must be a value that :mod:`pretrain.distributed.codec` sends; here as in the other functions.
    """
    if dist.get_rank() != 0:
        return _result(broadcast_message(None, 0, group))
    mine, message = _encoded(_outcome(function))
    return _result(_own(broadcast_message(message, 0, group), mine))


def gather_from_ranks(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """All-gather the results of ``function``, by rank; the error of the first rank that fails is raised on all."""
    return [_result(outcome) for outcome in gather_outcomes(function, group)]


def gather_outcomes(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[Outcome[T]]:
    """All-gather (result, error) of ``function``, by rank; nothing is raised."""
    mine, message = _encoded(_outcome(function))
    found: list[Outcome[T]] = all_gather_messages(message, group)
    rank = dist.get_rank(group)
    found[rank] = _own(found[rank], mine)
    return found


def raise_on_all_ranks(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call ``function`` on every rank and return its own result; the error of the first that fails is raised on all."""
    result, error = _outcome(function)
    gather_from_ranks(lambda: _result((None, error)), group)
    return result


def sum_over_ranks(values: NDArray[Number], group: dist.ProcessGroup | None = None) -> NDArray[Number]:
    """Sum of every element over the ranks of ``group``, on each of them; values of any shape."""
    total = torch.from_numpy(values).to(device_of(group))
    dist.all_reduce(total, group=group)
    return total.cpu().numpy()


def max_over_ranks(numbers: Sequence[int], device: torch.device) -> list[int]:
    """Elementwise maximum of ``numbers`` over all ranks, by one all-reduce."""
    shared = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.tolist()


def _outcome(function: Callable[[], T]) -> Outcome[T]:
    try:
        return function(), None
    except Exception as error:
        return None, error


def _encoded(outcome: Outcome[T]) -> tuple[Outcome[T], bytes]:
    """The outcome and its message. A result that cannot be sent is this rank's error: the others wait for a message."""
    try:
        return outcome, codec.encode(outcome)
    except TypeError as error:
        return (None, error), codec.encode((None, error))


def _own(received: Outcome[T], mine: Outcome[T]) -> Outcome[T]:
    """The outcome as received; an error of this rank is the original one, which has its traceback."""
    return mine if mine[1] is not None else received


def _result(outcome: Outcome[T]) -> T:
    result, error = outcome
    if error is not None:
        raise mark_collective(error)
    return result  # type: ignore[return-value]
