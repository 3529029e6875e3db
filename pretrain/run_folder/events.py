"""Event log of a run: starts, signals, hangs and failures with their times, one JSON line each.

Metrics must not depend on interruptions, so events have a file of their own.
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

# File errors that last until a person acts; others, such as EIO and ESTALE, may be gone at the next start.
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
    """Append an event in one write, so that several processes may append at the same time.

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
    """Record an exception that ends this rank.

    Rank 0 records an error that all ranks raise, and local rank 0 the loss of another rank.

    Args:
        begun: returns True once this job may write into the run folder.
    """
    from pretrain.distributed.collectives import LostRank  # imports torch, which readers of events do not need

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
    """Events in the order written; incomplete lines are skipped."""
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
