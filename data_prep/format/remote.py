"""Remote files: listing and fetching through fsspec, with retries and checks of size and sha256."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bd3_common.atomic import atomic_file
from data_prep.errors import DataError

PARTIAL = ".partial"
"""suffix of an unfinished copy"""
TRIES = 5
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before the second try, and at most before any
CHUNK = 8 << 20


def is_remote(path: str | Path) -> bool:
    """True for a URL such as ``s3://bucket/key``, false for a local path."""
    return "://" in str(path)


def open_remote(url: str) -> Any:
    """Open a remote file to read, as a context manager; credentials and endpoints come from fsspec's configuration.

    Raises:
        DataError: unknown protocol, or its package is not installed.
    """
    import fsspec

    try:
        return fsspec.open(url, "rb")
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: cannot be opened ({error}); install the package or correct the address") from None


def fetch(url: str, to: Path, size: int | None = None, sha256: str | None = None, tries: int = TRIES) -> str:
    """Copy a remote file to ``to`` and return its sha256; ``to`` is complete and checked, or absent.

    A failed or wrong copy is retried with exponential backoff and jitter.

    Args:
        size, sha256: expected values, if known.

    Raises:
        DataError: no try succeeded, or the file is missing; names the file and the last reason.
        OSError: ``to`` cannot be written.
    """
    problem = remedy = ""
    with atomic_file(to, durable=False, suffix=PARTIAL) as partial:
        for number in range(tries):
            if number:
                time.sleep(min(FIRST_WAIT * 2 ** (number - 1), LONGEST_WAIT) * random.uniform(0.5, 1.5))
            try:
                found, digest = _copy(url, partial)
            except FileNotFoundError:
                raise DataError(f"{url}: no such file; check the address") from None
            except PermissionError as error:
                raise DataError(f"{url}: access denied ({error}); check the credentials") from None
            except _SourceError as error:
                problem, remedy = f"{type(error.cause).__name__}: {error.cause}", "try later"
                continue
            remedy = "it was changed or damaged there: copy it again"
            if size is not None and found != size:
                problem = f"it has {found} bytes, {size} are expected"
            elif sha256 is not None and digest != sha256:
                problem = f"its sha256 is {digest[:12]}, {sha256[:12]} is expected"
            else:
                return digest
        problem = " ".join(problem.split())
        raise DataError(f"{url}: cannot be fetched after {tries} tries ({problem}); {remedy}")


class _SourceError(Exception):
    """Reading the remote file failed; other errors are those of the local disk."""

    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


def _copy(url: str, to: Path) -> tuple[int, str]:
    """Copy a file; returns (bytes, sha256)."""
    digest, size = hashlib.sha256(), 0
    with to.open("wb") as target:
        for chunk in _chunks(url):
            target.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _chunks(url: str) -> Iterator[bytes]:
    try:
        with open_remote(url) as source:
            while chunk := source.read(CHUNK):
                yield chunk
    except (DataError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # each protocol has its own exceptions
        raise _SourceError(error) from error


class RemoteFile(NamedTuple):
    """One remote file as listed."""

    url: str
    bytes: int | None  # None if the store does not tell
    stamp: str  # changes when the file does, if the store tells


class RemoteListing(NamedTuple):
    """Files of a URL: a single one, or those of a folder or glob."""

    single: RemoteFile | None
    files: list[RemoteFile]


def list_remote(url: str) -> RemoteListing:
    """List the file at ``url``, or the files directly in that folder or matched by that glob, sorted by URL.

    Raises:
        DataError: nothing is there, access is denied, the store cannot be reached, or its package is missing.
    """
    try:
        return _list_remote(url)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{url}: no such file or folder; check the address") from None
    except PermissionError as error:
        raise DataError(f"{url}: access denied ({_line(error)}); check the credentials") from None
    except ImportError as error:
        raise DataError(f"{url}: cannot be opened ({_line(error)}); pip install 'bd3-megatron[data]'") from None
    except Exception as error:  # each protocol has its own exceptions
        reason = f"{type(error).__name__}: {_line(error)}"
        raise DataError(f"{url}: cannot be listed ({reason}); check address and credentials") from None


def _list_remote(url: str) -> RemoteListing:
    import fsspec

    files, path = fsspec.url_to_fs(url)
    files.invalidate_cache()  # the stamp must be current
    magic = "*[" if url.startswith(("http://", "https://")) else "*?["  # a query is not a pattern
    if any(sign in url for sign in magic):
        infos = list(files.glob(path, detail=True).values())
        if not infos:
            raise DataError(f"{url}: nothing matches; check the pattern")
    else:
        info = files.info(path)
        if info["type"] != "directory" and not url.endswith("/"):
            return RemoteListing(_describe(files, info, url if "::" in url else files.unstrip_protocol(path)), [])
        infos = files.ls(path, detail=True)
    if "::" in url:
        raise DataError(f"{url}: a chained address stands for one file; name the files one by one")
    inside = [_describe(files, info) for info in infos if info["type"] == "file" and not info["name"].endswith("/")]
    return RemoteListing(None, sorted(inside))


def _describe(files: Any, info: dict[str, Any], url: str | None = None) -> RemoteFile:
    url = url or files.unstrip_protocol(info["name"])
    if info.get("size") is None:  # a web folder lists names only
        info = files.info(info["name"])
    strong = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "generation")
    dates = ("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "modified", "created")
    stamp = next((str(info[key]) for key in strong + dates if info.get(key)), "")
    return RemoteFile(url, info.get("size"), stamp.strip('"') or f"{info.get('size')} bytes")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
