"""Log messages: rank 0's on the console, every rank's in a file of its own, with the time and the rank.

Modules log with ``logging.getLogger(__name__)``: info for news, warning for trouble. Handlers are set here alone.
"""

from __future__ import annotations

import logging
import logging.handlers
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from bd3_common import PACKAGES
from bd3_common.atomic import no_follow
from bd3_common.text import printable, redacted

FILE_ONLY = {"file_only": True}
"""``extra`` of a message that is not printed on the console, which shows it another way"""
_UNLIMITED = sys.maxsize


class _Lines(logging.Formatter):
    """``2026-01-31 12:00:00 rank 0: text``; without a rank ``text``. Levels other than info are named.

    Control characters are written as escapes, passwords of URLs as ``***``.

    Args:
        prefix: begins each message, instead of a level.
    """

    def __init__(self, rank: int | None = None, prefix: str = ""):
        super().__init__()
        self.rank, self.prefix = rank, prefix

    def format(self, record: logging.LogRecord) -> str:
        words = [] if self.rank is None else [self.formatTime(record, "%Y-%m-%d %H:%M:%S"), f"rank {self.rank}"]
        words += [] if record.levelno == logging.INFO or self.prefix else [record.levelname]
        text = self.prefix + redacted(printable(super().format(record), keep="\n\t"))
        return f"{' '.join(words)}: {text}" if words else text


class _Console(logging.Handler):
    """Prints to the current ``sys.stderr``, or above a progress bar."""

    write: Callable[[str], None] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self.write is not None:
                self.write(self.format(record))
            else:
                print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(record, "file_only", False) and bool(super().filter(record))


class _File(logging.FileHandler):
    def _open(self) -> TextIOWrapper:
        """Open the log to append; a link is not followed."""
        return TextIOWrapper(open(self.baseFilename, "ab", opener=no_follow), self.encoding, write_through=True)

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the message: a full disk must not end a run because of a log line."""


_console = _Console()
_early: logging.handlers.MemoryHandler | None = None
_file: _File | None = None


def to_console(prefix: str = "") -> None:
    """Print messages on stderr, as a command without ranks does. Of other packages only warnings and errors.

    Args:
        prefix: begins each message, instead of a level.
    """
    close()
    _console.setFormatter(_Lines(prefix=prefix))
    root = logging.getLogger()
    if _console not in root.handlers:
        root.addHandler(_console)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)


def of_rank(rank: int) -> None:
    """Name time and rank in messages from now on; only rank 0 goes on printing them.

    Messages are buffered until :func:`to_file` names the file.
    """
    global _early
    to_console()
    _console.setFormatter(_Lines(rank))
    if rank != 0:
        logging.getLogger().removeHandler(_console)
    _early = logging.handlers.MemoryHandler(_UNLIMITED, flushLevel=_UNLIMITED)
    _early.setFormatter(_Lines(rank))
    logging.getLogger().addHandler(_early)


def to_file(path: Path) -> None:
    """Append the messages of this rank to ``path``, the buffered ones first.

    Raises:
        OSError: it cannot be written.
    """
    global _early, _file
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _File(path, encoding="utf-8")
    if _early is not None:
        file.setFormatter(_early.formatter)
        _early.setTarget(file)
        logging.getLogger().removeHandler(_early)
        _early.close()
        _early = None
    _file = file
    logging.getLogger().addHandler(_file)


def close() -> None:
    """Close the file and forget the rank."""
    global _early, _file
    root = logging.getLogger()
    for handler in (_early, _file):
        if handler is not None:
            root.removeHandler(handler)
            with suppress(OSError):
                handler.close()
    _early = _file = None
    _console.setFormatter(_Lines())
    _console.write = None


@contextmanager
def console_through(write: Callable[[str], None]) -> Iterator[None]:
    """Context in which messages are printed by ``write``, for example above a progress bar."""
    before, _console.write = _console.write, write
    try:
        yield
    finally:
        _console.write = before
