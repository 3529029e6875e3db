"""Job secret: 32 random bytes that only ranks of one user's job know, in a file of the run folder or the environment.

Ranks find each other over ports that anybody on the network can reach. Proof of the secret tells a rank from others
(:mod:`pretrain.distributed.proof`). The file exists only while the ranks meet.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from bd3_common.errors import ConfigError

VARIABLE = "BD3_JOB_KEY"
"""environment variable that gives the secret to all ranks of a job instead of the file"""
_BYTES = 32
_SHORTEST, _LONGEST = 32, 4096  # characters in the variable


class Unreadable(Exception):
    """The file is not there yet, is not complete, or is not to be trusted; the text says which."""


def from_environment(environ: Mapping[str, str] | None = None) -> bytes | None:
    """The secret that :data:`VARIABLE` gives; None if it is not set.

    Raises:
        ConfigError: it is too short or too long.
    """
    text = (os.environ if environ is None else environ).get(VARIABLE)
    if text is None:
        return None
    if not _SHORTEST <= len(text) <= _LONGEST:
        raise ConfigError(
            f"{VARIABLE}: has {len(text)} characters; give all ranks the same random text of {_SHORTEST} or more, "
            "for example from: openssl rand -hex 32"
        )
    return hashlib.sha256(os.fsencode(text)).digest()


class SecretFile:
    """The secret's file during the start of a job, on rank 0: a context that removes it, and folders made for it.

    Raises:
        OSError: it cannot be written.
        ConfigError: the file system does not keep its owner and mode.
    """

    def __init__(self, path: Path):
        self.path = path
        self.secret = os.urandom(_BYTES)
        self._made: list[Path] = []

    def __enter__(self) -> SecretFile:
        folder = self.path.parent
        self._made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)  # of a job that was killed
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(self.secret)
                file.flush()
                os.fsync(file.fileno())
            try:
                read(self.path)
            except Unreadable as error:
                raise ConfigError(f"{error}; set {VARIABLE} for all ranks instead") from None
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.path.unlink()
        for folder in self._made:
            with suppress(OSError):  # somebody else uses it by now
                folder.rmdir()


def read(path: Path) -> bytes:
    """The secret in a file that only this user can have written and read.

    Raises:
        Unreadable: it is not such a file, or not complete yet.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from None
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise Unreadable(f"{path}: is not a regular file")
        if found.st_uid != os.geteuid():
            raise Unreadable(f"{path}: belongs to user {found.st_uid}, this process to user {os.geteuid()}")
        if found.st_mode & 0o077:
            raise Unreadable(f"{path}: others may read or write it (mode {found.st_mode & 0o777:o})")
        secret = file.read(_BYTES + 1)
    if len(secret) != _BYTES:
        raise Unreadable(f"{path}: has {len(secret)} bytes, not {_BYTES}")
    return secret
