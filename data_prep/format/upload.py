"""Upload of files through fsspec, with retries: an object that is equal already stays, a new one is verified."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bd3_common.atomic import unique_suffix
from data_prep.errors import DataError
from data_prep.format.files import sha256_file
from data_prep.format.remote import TRIES, StoreError, backoff, line_of, sha256_remote, stamp_of, store_errors

PART = 64 << 20
"""bytes of one part of an upload to S3; files of less than two parts go whole"""
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "memory"}
"""protocols whose objects appear whole or not at all; others get a temporary name and a move"""


def upload(path: Path, url: str, tries: int = TRIES) -> str:
    """Copy a local file to ``url``, unless an equal file is there; returns the stamp of what is there then.

    Size and content are verified: by the checksum that the store tells, or else by reading the copy back. A failed or
    wrong copy is retried with exponential backoff and jitter.

    Raises:
        DataError: no try succeeded, or the store refuses; names the file and the last reason.
        OSError: ``path`` cannot be read.
    """
    size, problem = path.stat().st_size, ""
    for number in range(tries):
        if number:
            time.sleep(backoff(number))
        try:
            with writing(url):
                files, place = _located(url)
                stamp = _stamp_if_equal(files, place, url, path, size)
                if stamp is None:
                    _put(files, path, place)
                    stamp = _stamp_if_equal(files, place, url, path, size)
                if stamp is not None:
                    return stamp
                problem = "the copy differs from the file"
        except StoreError as error:
            problem = f"{type(error.cause).__name__}: {line_of(error.cause)}"
    raise DataError(f"{url}: cannot be written after {tries} tries ({problem}); try later: what is finished is kept")


def remove(url: str) -> None:
    """Remove a remote file, if it is there.

    Raises:
        DataError: the store refuses or fails.
    """
    try:
        with writing(url):
            files, place = _located(url)
            if files.exists(place):
                files.rm_file(place)
    except StoreError as error:
        raise DataError(f"{url}: cannot be removed ({line_of(error.cause)}); try later") from None


def writing(url: str) -> AbstractContextManager[None]:
    """Context that turns errors which no repetition mends into DataError, and others of the store into StoreError."""

    def other(error: Exception) -> Exception:
        if isinstance(error, NotImplementedError):
            return DataError(f"{url}: cannot be written with this protocol; use s3://, gs:// or a folder")
        return StoreError(error)

    return store_errors(url, "no such bucket or folder; create it, or correct the address", other)


def _located(url: str) -> tuple[Any, str]:
    import fsspec

    files, place = fsspec.url_to_fs(url)
    files.invalidate_cache()
    return files, place


def _put(files: Any, path: Path, place: str) -> None:
    protocols = _protocols(files)
    if protocols & {"s3", "s3a"}:
        files.put_file(str(path), place, chunksize=PART)
    elif protocols & OBJECT_STORES:
        files.put_file(str(path), place)
    else:
        folder, _, name = place.rpartition("/")
        files.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{name}.{unique_suffix()}.tmp"
        try:
            files.put_file(str(path), temporary)
            files.mv(temporary, place)
        except BaseException:
            if files.exists(temporary):
                files.rm_file(temporary)
            raise


def _protocols(files: Any) -> set[str]:
    return {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)


def _stamp_if_equal(files: Any, place: str, url: str, path: Path, size: int) -> str | None:
    """The stamp of the remote file, if it is there and equals ``path``."""
    try:
        info = files.info(place)
    except FileNotFoundError:
        return None
    if info["type"] == "directory":
        raise DataError(f"{url}: a folder is there; choose another address")
    if info["size"] != size:
        return None
    # A checksum that differs may be of encrypted content, so the content decides.
    if _has_checksum_of(info, path) or sha256_remote(url) == sha256_file(path):
        return stamp_of(info)
    return None


def _has_checksum_of(info: dict[str, Any], path: Path) -> bool:
    """True if the checksum in a store's listing is that of ``path``; False also if there is none that can be compared.

    S3: MD5, or of an upload in parts MD5 of their MD5s and the number of parts. Google: MD5 in base64.
    """
    tag = str(info.get("ETag", "")).strip('"')
    if re.fullmatch(r"[0-9a-f]{32}-\d+", tag):
        digests = list(_part_digests(path))
        return tag == f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"
    if not re.fullmatch(r"[0-9a-f]{32}", tag):
        tag = base64.b64decode(info.get("md5Hash") or "").hex()
    if not tag:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == tag


def _part_digests(path: Path) -> Iterator[bytes]:
    """MD5 of each part of an upload to S3."""
    with path.open("rb") as file:
        while part := file.read(PART):
            yield hashlib.md5(part, usedforsecurity=False).digest()
