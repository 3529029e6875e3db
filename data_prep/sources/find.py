"""Listing of input files: from files, folders, globs and URLs to the files to read, and what is passed over."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from data_prep.errors import DataError
from data_prep.format.manifest import FORMAT, MANIFEST, SPLITS, TOKENIZER
from data_prep.format.remote import RemoteFile, is_remote, list_remote
from data_prep.sources.inputs import Compression, Source
from data_prep.sources.kinds import INPUT_KINDS, FolderContent, kind_of, readable

DEEPEST = 100  # folders in folders that are looked through
HEAD = 16  # bytes of a file that tell its kind or compression
PACKED_MAGIC: dict[bytes, Compression] = {
    b"\x1f\x8b\x08": "gz",
    b"\x28\xb5\x2f\xfd": "zst",
    b"\xfd7zXZ\0": "xz",
}
RUN_FOLDER = {"config.yaml", "versions.txt", "metrics.jsonl"}  # entries of a run folder of bd3 pretrain
HIDDEN, UNKNOWN, AGAIN = "hidden", "of no known kind", "already read under another name"
OURS, RUN, FOREIGN = "data set of bd3 prep", "run folder", "not part of the data set in its folder"


@dataclass(frozen=True)
class PassedOver:
    """Files and folders that were not read for one reason; ``example`` is the path of the first."""

    reason: str
    count: int
    example: str


@dataclass
class Listing:
    """Files to read, in order, and what was passed over."""

    sources: list[Source] = field(default_factory=list)
    passed_over: list[PassedOver] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # lines for the user

    def pass_over(self, reason: str, path: object) -> None:
        """Count a file or folder that is not read."""
        for number, known in enumerate(self.passed_over):
            if known.reason == reason:
                self.passed_over[number] = PassedOver(reason, known.count + 1, known.example)
                return
        self.passed_over.append(PassedOver(reason, 1, str(path)))

    def lines(self) -> list[str]:
        """Lines for the user: notes, and what was passed over with the reasons."""
        if not self.passed_over:
            return self.notes
        found = "; ".join(
            f"{known.count} {known.reason} ({'' if known.count == 1 else 'for example '}{known.example!r})"
            for known in self.passed_over
        )
        return [*self.notes, f"passed over: {found}"]


def expand(inputs: Sequence[str]) -> list[Source]:
    """The files of :func:`find`."""
    return find(inputs).sources


def find(inputs: Sequence[str]) -> Listing:
    """List the files of ``inputs`` in the order given; a folder or a glob gives its files sorted by path.

    Folders are searched in depth, each once, however many links lead there. Passed over and counted are hidden
    entries, files of no known kind, data sets of ``bd3 prep``, run folders, and in a folder that is one data set what
    does not belong to it. The first bytes of local files tell Parquet and Arrow under any name. URLs are listed through
    fsspec.

    Raises:
        DataError: an input is missing, cannot be listed, has no readable files, has another type, or names a
            file a second time.
    """
    listing = Listing()
    seen: set[str] = set()
    for given in map(os.fspath, inputs):
        given = given.removeprefix("file://")
        before = len(listing.sources)
        if is_remote(given):
            _elsewhere(given, listing)
        else:
            _Local(listing).add(given)
        if len(listing.sources) == before:
            over = "".join(f"; {line}" for line in listing.lines())
            raise DataError(f"{given}: nothing here that can be read{over}; {readable()}")
        for source in listing.sources[before:]:
            place = source.path if source.remote else os.path.realpath(source.path)
            if place in seen:
                raise DataError(f"{source.path}: given twice, its documents would count double; name it once")
            seen.add(place)
    return listing


class _Local:
    """Search of one input on this machine."""

    def __init__(self, listing: Listing):
        self.listing = listing
        self.seen: set[tuple[int, int]] = set()  # device and inode of files and folders
        self._depth = 0

    def add(self, given: str) -> None:
        """Add the files of a path or glob."""
        path = Path(given)
        if os.path.lexists(given):
            if path.is_dir():
                self._folder(path)
            else:
                self._file(path)
            return
        pair = _pair_of(path)
        if pair is not None:  # the path without the suffixes, as Megatron names pairs
            self._file(pair)
            return
        if not glob.has_magic(given):
            raise DataError(f"{given}: no such file or folder; check the path")
        matches = sorted(map(Path, glob.glob(given, recursive=True)))
        if not matches:
            raise DataError(f"{given}: nothing matches; check the pattern")
        if "**" in given:  # matches the files in the folders, too
            matches = [path for path in matches if not path.is_dir()]
        self._entries(matches)

    def _folder(self, folder: Path) -> None:
        """Add the files of a folder and of all folders in it.

        Raises:
            DataError: folders are nested too deep, or one cannot be listed.
        """
        if self._depth == DEEPEST:
            raise DataError(f"{folder}: more than {DEEPEST} folders deep; name it as an input of its own")
        self._depth += 1
        self._all_of(folder)
        self._depth -= 1

    def _all_of(self, folder: Path) -> None:
        try:
            names = {entry.name for entry in os.scandir(folder)}
            status = folder.stat()
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed ({error.strerror}); check the folder and its rights") from None
        if self._again(status, folder):
            return
        own = OURS if _is_data_set(folder, names) else RUN if names >= RUN_FOLDER else None
        if own is not None:
            self.listing.pass_over(own, folder)
            return
        content = _content_of(folder, names)
        if content is None:
            self._entries(folder / name for name in sorted(names))
            return
        if content.note:
            self.listing.notes.append(content.note)
        wanted = {path.relative_to(folder).parts[0] for path in content.paths}
        for name in sorted(names - wanted - content.described):
            self.listing.pass_over(HIDDEN if name.startswith(".") else FOREIGN, folder / name)
        for path in content.paths:
            if path.is_dir():
                self._folder(path)
            else:
                self._file(path)

    def _entries(self, paths: Iterable[Path]) -> None:
        """Add files and folders that were found, not given; those of no known kind are passed over."""
        for path in paths:
            if path.name.startswith("."):
                self.listing.pass_over(HIDDEN, path)
            elif path.is_dir():
                self._folder(path)
            elif (problem := _unfit(path)) is not None:
                if problem:
                    self.listing.pass_over(problem, path)
            else:
                self._file(path, found=True)

    def _file(self, path: Path, found: bool = False) -> None:
        status = _status(path)
        if found and self._again(status, path):
            return
        self.listing.sources.append(_local(path, status))

    def _again(self, status: os.stat_result, path: Path) -> bool:
        """True for a file or folder that was added before, by another link."""
        place = status.st_dev, status.st_ino
        if place in self.seen:
            self.listing.pass_over(AGAIN, path)
            return True
        self.seen.add(place)
        return False


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the file and its rights") from None


def _local(path: Path, status: os.stat_result) -> Source:
    """The source of a local file, or of the pair that it belongs to."""
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: a pipe or device, not a file; write it to a file first")
    size, stamp = status.st_size, str(status.st_mtime_ns)
    kind = _kind(path)
    if kind is None and (pair := _whole_of(path)) is not None:
        return _local(pair, _status(pair))
    if kind is not None and (suffix := INPUT_KINDS.instance(kind[0]).partner):
        partner = _status(_beside(path, suffix))
        size, stamp = size + partner.st_size, f"{stamp} {partner.st_mtime_ns}"
    return _source(str(path), path.name, kind, size, stamp)


def _unfit(path: Path) -> str | None:
    """Reason why a file that was found is no input; None if it is one, and empty for the partner of one."""
    kind = _kind(path)
    if kind is None:
        return "" if _whole_of(path) is not None else UNKNOWN
    suffix = INPUT_KINDS.instance(kind[0]).partner
    if suffix and not _beside(path, suffix).is_file():
        return f"without a {suffix} beside it"
    return None


def _kind(path: Path) -> tuple[str, Compression | None] | None:
    """Kind and compression of a local file: by its first and last bytes, or else by its name."""
    named = kind_of(path.name)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
            return named
        with path.open("rb", buffering=0) as file:
            head = file.read(HEAD)
            file.seek(max(0, status.st_size - HEAD))
            tail = file.read(HEAD)
    except OSError:
        return named
    for name, kind in INPUT_KINDS.load_all().items():
        # The name of a text file counts unless both ends say otherwise; a file without a known name may be cut.
        if kind.magic and head.startswith(kind.magic) and (named is None or tail.endswith(kind.magic)):
            return name, None
    if named is not None and named[1] is None:
        packed = next((found for magic, found in PACKED_MAGIC.items() if head.startswith(magic)), None)
        if packed in INPUT_KINDS.instance(named[0]).compressions:
            return named[0], packed
    return named


def _pair_of(base: Path) -> Path | None:
    """The first file of a pair, from its path without either suffix."""
    for kind in INPUT_KINDS.load_all().values():
        for suffix in kind.suffixes if kind.partner else ():
            first = base.with_name(base.name + suffix)
            if first.is_file() and _beside(first, kind.partner).is_file():
                return first
    return None


def _whole_of(partner: Path) -> Path | None:
    """The first file of the pair of a partner; None if ``partner`` is no partner."""
    partners = {kind.partner for kind in INPUT_KINDS.load_all().values() if kind.partner}
    return _pair_of(partner.with_suffix("")) if partner.suffix in partners else None


def _beside(path: Path, suffix: str) -> Path:
    return path.with_suffix(suffix)


def _is_data_set(folder: Path, names: set[str]) -> bool:
    """True for a data set of ``bd3 prep``: its tars hold tokens."""
    path = folder / MANIFEST
    if MANIFEST not in names:
        return False
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            return False
        with path.open("rb") as file:
            return f'"format": "{FORMAT}"'.encode() in file.read(4096)
    except OSError:
        return False


def _content_of(folder: Path, names: set[str]) -> FolderContent | None:
    for kind in INPUT_KINDS.load_all():
        try:
            content = INPUT_KINDS.instance(kind).content_of(folder, names)
        except OSError as error:
            raise DataError(f"{folder}: cannot be read ({error.strerror}); check the folder and its rights") from None
        if content is not None:
            return content
    return None


def _elsewhere(given: str, listing: Listing) -> None:
    """Add the files of a URL: the file, or those in the folder or matched by the glob."""
    found = list_remote(given)
    if found.single is not None:
        listing.sources.append(_remote(found.single))
        return
    own = _data_sets([file.url for file in found.files])
    for folder in sorted(own):
        listing.pass_over(OURS, folder)
    for file in found.files:
        name = _url_name(file.url)
        inner = file.url.removeprefix(given) if file.url.startswith(given) else name
        kind = kind_of(name)
        if any(file.url.startswith(f"{folder}/") for folder in own):
            continue
        if any(part.startswith(".") for part in PurePosixPath(inner).parts):
            listing.pass_over(HIDDEN, file.url)
        elif kind is None or INPUT_KINDS.instance(kind[0]).partner:
            listing.pass_over(UNKNOWN, file.url)
        else:
            listing.sources.append(_remote(file))


def _data_sets(urls: Sequence[str]) -> set[str]:
    """Addresses of the folders among ``urls`` that are data sets of ``bd3 prep``, by the names in them."""
    names = set(urls)
    folders = {url.removesuffix(f"/{MANIFEST}") for url in urls if url.endswith(f"/{MANIFEST}")}
    shards = {folder for folder in folders if any(url.startswith(f"{folder}/{SPLITS[0]}/") for url in urls)}
    return {folder for folder in shards if f"{folder}/{TOKENIZER}" in names}


def _remote(file: RemoteFile) -> Source:
    if file.bytes is None:
        raise DataError(f"{file.url}: its size is not known, so a cut copy would go unseen; download it and name it")
    name = _url_name(file.url)
    kind = kind_of(name)
    if kind is not None and INPUT_KINDS.instance(kind[0]).partner:
        raise DataError(f"{file.url}: one file of a pair; download both files and name them")
    return _source(file.url, name, kind, file.bytes, file.stamp)


def _url_name(url: str) -> str:
    """Base name of a URL; only a web address can have a query after ``?``."""
    path = urlsplit(url).path if url.startswith(("http://", "https://")) else url
    return PurePosixPath(path).name


def _source(path: str, name: str, kind: tuple[str, Compression | None] | None, size: int, stamp: str) -> Source:
    if kind is None:
        raise DataError(f"{path}: not a file type that can be read; {readable()}")
    try:
        name.encode()
    except UnicodeEncodeError:  # the JSON of manifest and rejects cannot store it
        raise DataError(f"{path}: the file's name is not UTF-8; rename it") from None
    return Source(path, name, *kind, size, stamp)
