"""Files elsewhere: fetched whole through fsspec, with retries, checked, and never half there."""

from __future__ import annotations

import hashlib
import os
import random
import time
from contextlib import suppress
from pathlib import Path

from data_prep.errors import DataError

ATTEMPTS = 5
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before the second attempt, and at most before any
CHUNK = 8 << 20


def is_remote(path: str | Path) -> bool:
    """Whether ``path`` is a URL such as ``s3://bucket/key`` rather than a place in this file system."""
    return "://" in str(path)


def open_remote(url: str, mode: str = "rb"):
    """An fsspec file (a context manager); credentials and endpoints come from fsspec's own configuration.

    Raises:
        DataError: no such protocol, or its package is not installed.
    """
    import fsspec

    try:
        return fsspec.open(url, mode)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: cannot be opened ({error}); install the package or correct the address") from None


def fetch(url: str, to: Path, size: int | None = None, sha256: str | None = None, attempts: int = ATTEMPTS) -> str:
    """Copy a remote file to ``to`` and return its sha256; ``to`` is complete and checked, or absent.

    A failed or wrong copy is tried again after a pause that doubles, with jitter.

    Args:
        size, sha256: what the copy must have, if known.

    Raises:
        DataError: no attempt succeeded, or the file is missing; names the file and the last reason.
        OSError: ``to`` cannot be written.
    """
    partial = to.with_name(f".{to.name}.{os.getpid()}-{random.randrange(2**32):08x}.partial")
    try:
        for attempt in range(attempts):
            if attempt:
                time.sleep(min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.5, 1.5))
            try:
                found, digest = _copy(url, partial)
            except FileNotFoundError:
                raise DataError(f"{url}: no such file; check the address") from None
            except PermissionError as error:
                raise DataError(f"{url}: access denied ({error}); check the credentials") from None
            except _SourceError as error:
                problem = f"{type(error.cause).__name__}: {error.cause}"
                continue
            if size is not None and found != size:
                problem = f"it has {found} bytes, {size} are expected"
            elif sha256 is not None and digest != sha256:
                problem = f"its sha256 is {digest[:12]}, {sha256[:12]} is expected"
            else:
                os.replace(partial, to)
                return digest
        raise DataError(f"{url}: cannot be fetched after {attempts} attempts ({' '.join(problem.split())}); try later")
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


class _SourceError(Exception):
    """Reading the remote side failed; everything else is about this machine's disk."""

    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


def _copy(url: str, to: Path) -> tuple[int, str]:
    """(bytes, sha256) of what was copied."""
    digest, size = hashlib.sha256(), 0
    with to.open("wb") as target:
        for chunk in _chunks(url):
            target.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _chunks(url: str):
    try:
        with open_remote(url) as source:
            while chunk := source.read(CHUNK):
                yield chunk
    except (DataError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # every protocol has exceptions of its own
        raise _SourceError(error) from error
