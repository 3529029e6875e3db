"""Hashes and identities of files."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
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
