"""Event log of a run: starts, signals, hangs and failures with their times, one JSON line each.

Metrics must not depend on interruptions, so events have a file of their own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from bd3_common import schema
from bd3_common.errors import ConfigError, UserError
from bd3_common.lines import append_line, cut_torn_line, locked_lines
from bd3_common.schema import Count, Record
from bd3_common.text import redacted
from data_prep.errors import DataError
from pretrain.distributed.ranks import Ranks
from pretrain.run_folder.layout import EVENTS

_LOG = logging.getLogger(__name__)

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


# Words that may become arguments of Slurm's commands: no options, no lists, no spaces.
JobId = Annotated[str, Field(pattern=r"^([0-9][0-9_+]{0,40})?$")]
Host = Annotated[str, Field(pattern=r"^[^\s,=\-\x00-\x1f][^\s,=\x00-\x1f]{0,254}$")]


class Event(Record):
    """One line of the log; each event has some of the fields, and may have others, which pass unchecked."""

    model_config = ConfigDict(extra="allow")

    time: float = Field(ge=0, le=1e11, description="seconds since 1970")
    event: str
    job: JobId | None = None
    jobs: list[JobId] = Field(default=[])
    nodes: list[Host] = Field(default=[])
    hosts: list[Host] = Field(default=[])
    suspects: list[Host] = Field(default=[])
    excluded: list[Host] = Field(default=[])
    restart: Count | None = None
    lineage: str = ""
    code: int | None = None
    kind: str | None = None
    cause: str | None = None
    text: str | None = None
    signal: str | None = None
    step: Count | None = None
    before: Count | None = None
    rank: Count | None = None
    mistake: bool = False


def record(run: Path, event: str, **fields: Any) -> None:
    """Append an event; several processes may append at the same time.

    Passwords of URLs in its texts are written as ``***``.

    Raises:
        OSError: the folder cannot be written.
    """
    fields = {name: redacted(value) if isinstance(value, str) else value for name, value in fields.items()}
    line = json.dumps({"time": round(time.time(), 3), "event": event} | fields) + "\n"
    with locked_lines(run / EVENTS) as file:
        cut_torn_line(file)  # of a killed process: this line would be lost with it
        append_line(file, line.encode())


def mend(run: Path) -> None:
    """Cut a torn last line off the event log, and log that.

    Raises:
        OSError: it cannot be written.
    """
    if (run / EVENTS).is_file():
        with locked_lines(run / EVENTS) as file:
            if torn := cut_torn_line(file):
                _LOG.warning(f"{run / EVENTS}: the last line was torn; its {torn} bytes are cut off")


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
    """Events in the order written, with the fields they have; lines that are no event are skipped.

    Raises:
        ConfigError: the log is no regular file, or too large for one.
        OSError: it cannot be read.
    """
    try:
        lines = schema.read_bytes(run / EVENTS, ConfigError).splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(UserError):
            found.append(schema.parse(line, Event, run / EVENTS).model_dump(exclude_unset=True))
    return found
