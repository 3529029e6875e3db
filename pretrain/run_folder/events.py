"""What happened to a run from outside: attempts, signals, hangs, failures; a JSON line each in the run folder.

What a run computes is in its metrics, which are the same whatever happens; here is what did happen, with the time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bd3_common.errors import ConfigError
from data_prep.errors import DataError
from pretrain.distributed.ranks import Ranks
from pretrain.run_folder.layout import EVENTS

# Of files that will not be better at the next start; others, as EIO and ESTALE, may.
_LASTING = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
}


def record(run: Path, event: str, **fields: Any) -> None:
    """Append an event by one write, so that processes may do it at the same time.

    Raises:
        OSError: the folder cannot be written.
    """
    line = json.dumps({"time": round(time.time(), 3), "event": event} | fields) + "\n"
    file = os.open(run / EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


@contextlib.contextmanager
def failures(run: Path, ranks: Ranks, begun: Callable[[], bool]) -> Iterator[None]:
    """Record what ends this rank, unless another rank says it: one for all, or one of each machine.

    Args:
        begun: whether the run folder is this job's to write into.
    """
    from pretrain.distributed.collectives import LostRank  # brings torch, which those who read events go without

    try:
        yield
    except (Exception, LostRank) as error:
        lost, collective = isinstance(error, LostRank), getattr(error, "collective", False)
        if begun() and (ranks.local_rank == 0 if lost else ranks.rank == 0 or not collective):
            with contextlib.suppress(OSError):
                record(
                    run,
                    "lost" if lost else "failed",
                    rank=ranks.rank,
                    host=socket.gethostname(),
                    text=" ".join(str(error).split())[:500] or type(error).__name__,
                    mistake=isinstance(error, ConfigError | DataError) or getattr(error, "errno", None) in _LASTING,
                )
        raise


def read(run: Path) -> list[dict[str, Any]]:
    """The events in the order written; lines that are none, as a torn one, are left out."""
    try:
        lines = (run / EVENTS).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
            if isinstance(event["event"], str) and isinstance(event["time"], int | float):
                found.append(event)
        except (ValueError, TypeError, KeyError):
            continue
    return found
