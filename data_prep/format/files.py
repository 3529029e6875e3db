"""Hashes and identities of files."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes.

    Raises:
        OSError: it cannot be read, or is not a regular file: a pipe would be waited for, a device has no end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def lies_at(descriptor: int, path: Path) -> bool:
    """True if an open file is still at ``path``; the former owner of a lock may have removed it with its folder."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


Identity = tuple[int, int, int, int]
"""device, inode, bytes and modification time in ns; changes when a file is replaced or written"""


def identity_of(status: os.stat_result) -> Identity:
    """Identity of a file from its status."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
