"""Remote files: listing and fetching through fsspec, with retries and checks of size and sha256."""

from __future__ import annotations

import hashlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from bd3_common.atomic import atomic_file
from bd3_common.schema import MAX_BYTES
from bd3_common.text import shorten
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


def fetch(
    url: str,
    to: Path,
    size: int | None = None,
    sha256: str | None = None,
    tries: int = TRIES,
    most: int | None = None,
) -> str:
    """Copy a remote file to ``to`` and return its sha256; ``to`` is complete and checked, or absent.

    A failed or wrong copy is retried with exponential backoff and jitter.

    Args:
        size, sha256: expected values, if known.
        most: bytes that the file may have.

    Raises:
        DataError: no try succeeded, or the file is missing; names the file and the last reason.
        OSError: ``to`` cannot be written.
    """
    problem = remedy = ""
    with atomic_file(to, durable=False, suffix=PARTIAL) as partial:
        for number in range(tries):
            if number:
                time.sleep(backoff(number))
            try:
                found, digest = _copy(url, partial, most, size)
            except StoreError as error:
                problem, remedy = f"{type(error.cause).__name__}: {error.cause}", "try later"
                continue
            remedy = "it was changed or damaged there: copy it again"
            if size is not None and found != size:
                problem = f"it has {found} bytes{' or more' if found > size else ''}, {size} are expected"
            elif sha256 is not None and digest != sha256:
                problem = f"its sha256 is {digest[:12]}, {sha256[:12]} is expected"
            else:
                return digest
        problem = " ".join(problem.split())
        raise DataError(f"{url}: cannot be fetched after {tries} tries ({problem}); {remedy}")


def backoff(number: int) -> float:
    """Seconds to wait before try ``number`` (the first one is 0)."""
    longest: float = min(FIRST_WAIT * 2.0 ** (number - 1), LONGEST_WAIT)
    return longest * random.uniform(0.5, 1.5)


def read_remote(url: str, most: int = MAX_BYTES) -> bytes:
    """Content of a small remote file; errors as :func:`fetch`, or it has more than ``most`` bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "content"
        fetch(url, path, most=most)
        return path.read_bytes()


def sha256_remote(url: str) -> str:
    """sha256 of a remote file. Errors are those of the protocol."""
    digest = hashlib.sha256()
    with open_remote(url) as source:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class StoreError(Exception):
    """The store failed, perhaps for this time only; other errors are those of the local disk."""

    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


def _copy(url: str, to: Path, most: int | None, expected: int | None) -> tuple[int, str]:
    """Copy a file of at most ``most`` bytes, and no more than the first chunk beyond those ``expected``.

    Returns:
        Its bytes as far as they were copied, and their sha256.
    """
    digest, size = hashlib.sha256(), 0
    with to.open("wb") as target:
        for chunk in _chunks(url):
            target.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            if most is not None and size > most:
                raise DataError(f"{url}: has more than {most} bytes, which no file of this kind has")
            if expected is not None and size > expected:
                break
    return size, digest.hexdigest()


def _chunks(url: str) -> Iterator[bytes]:
    with store_errors(url, "no such file; check the address", StoreError), open_remote(url) as source:
        while chunk := source.read(CHUNK):
            yield chunk


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
    """List the file at ``url``, or the files in that folder or matched by that glob, sorted by URL.

    Folders are listed in depth, but for those of web servers, whose pages link anywhere.

    Raises:
        DataError: nothing is there, access is denied, the store cannot be reached, or its package is missing.
    """
    with _listing(url):
        return _list_remote(url)


def tree_remote(url: str) -> dict[str, RemoteFile]:
    """All files below a folder, in any depth, by path below it, sorted; empty if there is no such folder.

    A file at ``url`` itself has the path ``""``.

    Raises:
        DataError: access is denied, the store cannot be reached, or its package is missing.
    """
    import fsspec

    with _listing(url):
        files, path = fsspec.url_to_fs(url)
        files.invalidate_cache()
        infos = files.find(path, detail=True)
        below = path.rstrip("/") + "/"
        return {
            name.removeprefix(below) if name != path else "": _describe(files, info)
            for name, info in sorted(infos.items())
            if info["type"] == "file" and not name.endswith("/")
        }


@contextmanager
def store_errors(url: str, missing: str, other: Callable[[Exception], Exception]) -> Iterator[None]:
    """Context that turns errors of the store which no repetition mends into DataError.

    Args:
        missing: reason and remedy for a file that is not there.
        other: gives the error to raise for another one; each protocol has exceptions of its own.
    """
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{url}: {missing}") from None
    except PermissionError as error:
        raise DataError(f"{url}: access denied ({line_of(error)}); check the credentials") from None
    except ImportError as error:
        raise DataError(f"{url}: cannot be opened ({line_of(error)}); pip install 'bd3-megatron[data]'") from None
    except Exception as error:
        raise other(error) from error


def _listing(url: str) -> AbstractContextManager[None]:
    """Context that turns the errors of every protocol into DataError."""

    def other(error: Exception) -> DataError:
        reason = f"{type(error).__name__}: {line_of(error)}"
        return DataError(f"{url}: cannot be listed ({reason}); check address and credentials")

    return store_errors(url, "no such file or folder; check the address", other)


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
        web = url.startswith(("http://", "https://"))
        infos = files.ls(path, detail=True) if web else list(files.find(path, detail=True).values())
    if "::" in url:
        raise DataError(f"{url}: a chained address stands for one file; name the files one by one")
    inside = [_describe(files, info) for info in infos if info["type"] == "file" and not info["name"].endswith("/")]
    return RemoteListing(None, sorted(inside))


def _describe(files: Any, info: dict[str, Any], url: str | None = None) -> RemoteFile:
    url = url or files.unstrip_protocol(info["name"])
    if info.get("size") is None:  # a web folder lists names only
        info = files.info(info["name"])
    return RemoteFile(url, info.get("size"), stamp_of(info))


def stamp_of(info: dict[str, Any]) -> str:
    """A text that changes when the file does, as far as the store's record of it tells."""
    strong = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "generation")
    dates = ("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "modified", "created")
    stamp = next((info[key] for key in strong + dates if info.get(key)), "")
    if isinstance(stamp, datetime):  # some listings tell the same moment as a number
        stamp = stamp.timestamp()
    return str(stamp).strip('"') or f"{info.get('size')} bytes"


def line_of(error: Exception) -> str:
    """Message of another program's error on one short line."""
    return shorten(" ".join(str(error).split()), 200)
