"""Listing of input files: from files, folders, globs and URLs to the files to read."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from data_prep.errors import DataError
from data_prep.format.remote import RemoteFile, is_remote, list_remote
from data_prep.sources.inputs import Source
from data_prep.sources.kinds import kind_of, readable


def expand(inputs: Sequence[str]) -> list[Source]:
    """List the files of ``inputs`` in the order given; a folder or a glob gives its files sorted by name.

    Folders are not searched recursively (a glob with ``**`` is); hidden files and files of other types in them are
    skipped. URLs of files, folders and globs are listed through fsspec.

    Raises:
        DataError: an input is missing, cannot be listed, has no readable files, has another type, or names a
            file a second time.
    """
    sources: list[Source] = []
    for given in map(os.fspath, inputs):
        given = given.removeprefix("file://")
        found = _elsewhere(given) if is_remote(given) else _here(given)
        if not found:
            raise DataError(f"{given}: nothing here that can be read; {readable()}")
        sources += found
    seen: set[str] = set()
    for source in sources:
        place = source.path if source.remote else os.path.realpath(source.path)
        if place in seen:
            raise DataError(f"{source.path}: given twice, its documents would count double; name it once")
        seen.add(place)
    return sources


def _here(given: str) -> list[Source]:
    """Sources of a local path or glob."""
    if os.path.lexists(given):
        if Path(given).is_dir() and kind_of(Path(given).name) is None:
            return list(_in_folder(Path(given)))
        return [_local(Path(given))]
    if not glob.has_magic(given):
        raise DataError(f"{given}: no such file or folder; check the path")
    matches = sorted(map(Path, glob.glob(given, recursive=True)))
    if not matches:
        raise DataError(f"{given}: nothing matches; check the pattern")
    if "**" in given:  # matches the files in the folders, too
        matches = [path for path in matches if not path.is_dir()]
    sources: list[Source] = []
    for path in matches:
        if kind_of(path.name) is not None:
            sources.append(_local(path))
        elif path.is_dir():
            sources += _in_folder(path)
    return sources


def _in_folder(folder: Path) -> Iterator[Source]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check the folder and its rights") from None
    for name in names:
        if kind_of(name) is not None and not name.startswith("."):
            yield _local(folder / name)


def _local(path: Path) -> Source:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its rights") from None
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path}: a folder with the name of a file; rename it, or name the files in it: {path}/*")
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: a pipe or device, not a file; write it to a file first")
    return _source(str(path), path.name, status.st_size, str(status.st_mtime_ns))


def _elsewhere(given: str) -> list[Source]:
    """Sources of a URL: the file, or those in the folder or matched by the glob."""
    found = list_remote(given)
    if found.single is not None:
        return [_remote(found.single)]
    named = ((_url_name(file.url), file) for file in found.files)
    wanted = [(name, file) for name, file in named if kind_of(name) is not None and not name.startswith(".")]
    return [_remote(file) for _, file in sorted(wanted, key=lambda pair: pair[1].url)]


def _remote(file: RemoteFile) -> Source:
    if file.bytes is None:
        raise DataError(f"{file.url}: its size is not known, so a cut copy would go unseen; download it and name it")
    return _source(file.url, _url_name(file.url), file.bytes, file.stamp)


def _url_name(url: str) -> str:
    """Base name of a URL; only a web address can have a query after ``?``."""
    path = urlsplit(url).path if url.startswith(("http://", "https://")) else url
    return PurePosixPath(path).name


def _source(path: str, name: str, size: int, stamp: str) -> Source:
    kind = kind_of(name)
    if kind is None:
        raise DataError(f"{path}: not a file type that can be read; {readable()}")
    try:
        name.encode()
    except UnicodeEncodeError:  # the JSON of manifest and rejects cannot store it
        raise DataError(f"{path}: the file's name is not UTF-8; rename it") from None
    return Source(path, name, *kind, size, stamp)
