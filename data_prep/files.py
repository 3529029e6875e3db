"""Files that are complete or absent, and what identifies their content."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written(path: Path, more: bool = False) -> Iterator[Path]:
    """A temporary place for what ``path`` is to hold: moved there, on the disk, once the block has succeeded.

    ``more`` says that another file of the same folder follows, which has the new name put on the disk with its own.

    The temporary name is this process's own: another process that writes the same file does no harm.
    """
    temporary = path.with_name(f".{path.name}.{own()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        if not more:
            sync(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def own() -> str:
    """Part of a file name that no other process has. A process id alone may be that of a process on another host."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, or leave what was there."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def lies_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still lies at ``path``: who held a lock before may have removed it with its folder."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
