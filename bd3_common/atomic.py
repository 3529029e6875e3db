"""The atomic writer: a file is complete under its name, or what was there before stays."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_file(path: Path, sync_folder: bool = True, durable: bool = True, suffix: str = ".tmp") -> Iterator[Path]:
    """A temporary path beside ``path``; what the block writes there is synced and renamed to ``path`` at its end.

    The temporary name is unique to this process, so that processes that write the same file do not disturb each
    other. An existing file keeps its permissions; a new one is readable by all, less the umask. If the block raises,
    the temporary file is removed.

    Args:
        sync_folder: also sync the folder's entries; False if another file of the same folder follows.
        durable: False skips all syncing, for a file that is soon written again: after a power cut it may be old or
            empty.
        suffix: of the temporary name, for libraries that look at it.

    Raises:
        OSError: it cannot be written; ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{unique_suffix()}{suffix}")
    try:
        yield temporary
        if path.exists():
            os.chmod(temporary, path.stat().st_mode & 0o777)
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable and sync_folder:
            sync(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a whole file atomically; ``durable`` as in :func:`atomic_file`."""
    with atomic_file(path, durable=durable) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Write a whole UTF-8 text file atomically; ``durable`` as in :func:`atomic_file`."""
    write_bytes(path, text.encode(), durable)


def unique_suffix() -> str:
    """Part of a file name that no other process uses: a process id alone may be that of a process on another host."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
