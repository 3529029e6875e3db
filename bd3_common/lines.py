"""Files of lines that processes append to: a line is written whole or not at all, and a torn last one is cut off."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from bd3_common.atomic import no_follow, write_all

_BLOCK = 1 << 16
_LOCK_TRIES, _LOCK_WAIT = 100, 0.01  # seconds


def append_line(file: int, line: bytes) -> None:
    """Append a line to an open file; if it cannot be written whole, the part that was is removed.

    Raises:
        OSError: it cannot be written.
    """
    size = os.fstat(file).st_size
    try:
        write_all(file, line)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file, size)
        raise


def cut_torn_line(file: int) -> int:
    """Cut a file that is open to read and write back to the end of its last whole line; returns the bytes removed."""
    size = end = os.fstat(file).st_size
    while end:
        begin = max(0, end - _BLOCK)
        found = os.pread(file, end - begin, begin).rfind(b"\n")
        if found >= 0:
            end = begin + found + 1
            break
        end = begin
    if end < size:
        os.ftruncate(file, end)
    return size - end


@contextlib.contextmanager
def locked_lines(path: Path) -> Iterator[int]:
    """Descriptor of a file that several processes append to, created if it is missing, locked for this one.

    A lock that does not come, of a stopped process or a file system without locks, holds up nobody.

    Raises:
        OSError: it cannot be opened.
    """
    file = no_follow(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        _lock(file)
        yield file
    finally:
        os.close(file)


def _lock(file: int) -> None:
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_LOCK_WAIT)
        except OSError:
            return
