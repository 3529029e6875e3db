"""Real processes over gloo: start a world, run a function on every rank, return what the ranks return."""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from tests.unit.commands import FORKS

TIMEOUT = 300  # seconds


def run_world(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, size, store, *args)`` in ``size`` processes; results by rank.

    Args:
        function: a module-level function. ``store`` is a file store that all ranks share.

    Raises:
        AssertionError: with the traceback of the first rank that failed.
    """
    results: Any = FORKS.Queue()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "store")
        ranks = [
            FORKS.Process(target=_rank, args=(rank, size, path, results, function, args), daemon=True)
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        try:
            found: dict[int, Any] = {}
            while len(found) < size:
                rank, error, result = results.get(timeout=TIMEOUT)
                assert error is None, f"rank {rank}:\n{error}"
                found[rank] = pickle.loads(result)
        finally:
            for process in ranks:
                if len(found) < size:
                    process.kill()
                process.join()
    return [found[rank] for rank in range(size)]


def _rank(rank: int, size: int, path: str, results: Any, function: Callable[..., Any], args: tuple) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        result = function(rank, size, dist.FileStore(path, size), *args)
        # Through bytes, because tensors in a queue die with the process that sent them.
        results.put((rank, None, pickle.dumps(result)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
