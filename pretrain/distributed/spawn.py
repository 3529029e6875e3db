"""A world of processes on one machine: run a function on every rank and return the results."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

from bd3_common.safe_path import safe_path

# Ranks are forks of one process that has done the imports already.
FORKS = multiprocessing.get_context("forkserver")
TIMEOUT = 900  # seconds, for a busy machine: a rank that dies is noticed at once


def run_world(size: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Run ``function(rank, size, store, *args)`` in ``size`` processes and return the results by rank.

    Args:
        function: a module-level function. ``store`` is a file store that all ranks share.
        timeout: seconds until the ranks are killed.

    Raises:
        RuntimeError: with the traceback of the first rank that failed, or the ranks that died or did not finish.
    """
    with tempfile.TemporaryDirectory() as folder, safe_path():
        results: Any = FORKS.Queue()
        path = os.path.join(folder, "store")
        ranks = [
            FORKS.Process(target=_rank, args=(rank, size, path, results, function, args), daemon=True)
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        found: dict[int, Any] = {}
        end = time.monotonic() + timeout
        try:
            while len(found) < size:
                rank, error, result = _next(results, ranks, found, end)
                if error is not None:
                    raise RuntimeError(f"rank {rank}:\n{error}")
                found[rank] = pickle.loads(result)
        finally:
            for process in ranks:
                if len(found) < size:
                    process.kill()
                process.join()
    return [found[rank] for rank in range(size)]


def _next(results: Any, ranks: list, found: dict[int, Any], end: float) -> tuple[int, str | None, bytes | None]:
    while True:
        try:
            return results.get(timeout=0.5)
        except queue.Empty:
            dead = [n for n, process in enumerate(ranks) if n not in found and process.exitcode not in (None, 0)]
            if dead:
                raise RuntimeError(f"rank {dead[0]} died with exit code {ranks[dead[0]].exitcode}") from None
            if time.monotonic() > end:
                missing = sorted(set(range(len(ranks))) - set(found))
                raise RuntimeError(f"ranks {missing} did not finish in time") from None


def _rank(rank: int, size: int, path: str, results: Any, function: Callable[..., Any], args: tuple) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        result = function(rank, size, dist.FileStore(path, size), *args)
        # As bytes: a queue's tensors are lost with the process that sent them. Pickle is safe here: the pipe joins this
        # user's process with its own child, and nobody else can write into it.
        results.put((rank, None, pickle.dumps(result)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
