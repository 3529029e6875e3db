"""Pool of worker processes, which never outlive their parent."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from bd3_common.safe_path import safe_path
from data_prep.errors import DataError

TICK = 1.0  # seconds between calls of ``tick``
MOST_A_CORE = 8  # workers
LITTLE = 64 << 20
"""bytes of work for which starting processes takes longer than it saves"""
_PR_SET_PDEATHSIG = 1

_counter: Any = None  # in a worker: the shared counter of bytes


def run(
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    workers: int,
    tick: Callable[[int], None],
    size: int | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Run ``function(job)`` in up to ``workers`` processes; yields ``(job, result)`` as jobs finish.

    A result is the function's return value, or the DataError that it raised; any other exception is raised here and
    stops the workers. A single worker is this process.

    Args:
        function: of a module's top level; it reports progress through :func:`count`.
        tick: called about once a second with the sum of all counts.
        size: bytes to work through, if known: :data:`LITTLE` or less is done in this process.

    Raises:
        DataError: a worker died, or there would be too many.
    """
    global _counter
    if workers > (most := max(64, MOST_A_CORE * (os.cpu_count() or 1))):
        raise DataError(f"workers={workers}: too many for the cores of this machine; use {most} or fewer")
    if min(workers, len(jobs)) <= 1 or (size is not None and size <= LITTLE):
        _counter = _Local(tick)
        for job in jobs:
            yield job, _result_of(function, job)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks and torch's state
    with safe_path():  # the first lock starts multiprocessing's resource tracker
        counter = context.Value("q", 0)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _start, (counter, os.getpid()))
    try:
        with safe_path():  # each job may start a process
            waiting = {pool.submit(_result_of, function, job): job for job in jobs}
        while waiting:
            done, _ = wait(waiting, TICK, FIRST_COMPLETED)
            tick(counter.value)
            for future in done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process died (killed, or out of memory); run again with fewer --workers: what is finished is kept"
        ) from None
    finally:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def count(amount: int) -> None:
    """Add to the sum that ``tick`` gets."""
    if _counter is not None:
        with _counter.get_lock():
            _counter.value += amount


class _Local:
    """Counter of a single process; calls ``tick`` by itself."""

    def __init__(self, tick: Callable[[int], None]):
        self._tick, self._told, self._value = tick, time.monotonic(), 0

    def get_lock(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @property
    def value(self) -> int:
        return self._value

    @value.setter
    def value(self, value: int) -> None:
        self._value = value
        if time.monotonic() - self._told >= TICK:
            self._told = time.monotonic()
            self._tick(value)


def _result_of(function: Callable[[Any], Any], job: Any) -> Any:
    try:
        return function(job)
    except DataError as error:
        return error


def _start(counter: Any, parent: int) -> None:
    """Initialize a worker."""
    global _counter
    _counter = counter
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops it
    if sys.platform == "linux":
        # Otherwise workers of a killed parent would finish their jobs.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep ``tokenizers`` from starting threads, so that one process uses one core."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
