"""Destinations of a data set: a folder, where it appears by one rename, or a prefix of an object store.

At a store, finished shards are uploaded one by one and removed here. The manifest goes last: what has none is no data
set. While it is unfinished, the object ``unfinished.json`` names the work folder that it belongs to.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from bd3_common.atomic import write_text
from bd3_common.schema import Record, parse
from bd3_common.text import shorten
from data_prep.build.assemble import ShardJob
from data_prep.build.work_folder import Work, check_replaceable
from data_prep.errors import DataError
from data_prep.format.manifest import (
    FORMAT,
    MANIFEST,
    MEND,
    REJECTS,
    SPLITS,
    TOKENIZER,
    Manifest,
    check_files,
    load_manifest,
    parse_manifest,
    shard_path,
)
from data_prep.format.remote import RemoteFile, is_remote, read_remote, tree_remote
from data_prep.format.upload import remove, upload
from data_prep.read.cache import default_folder

UNFINISHED: Final = "unfinished.json"
_SHARDS = "|".join(rf"{name}/{name}-\d{{6,}}\.tar" for name in SPLITS)
_OURS = re.compile(rf"{_SHARDS}|{re.escape(REJECTS)}|(?:.*/)?\.[^/]*\.tmp")
"""files that another data set of ours may have left: shards, rejects, and copies that were broken off"""


class Claim(Record):
    """Contents of ``unfinished.json``: the random name of the work folder that uploads to the prefix."""

    format: Literal["bd3-rows-unfinished"] = "bd3-rows-unfinished"
    work: str


class Destination(ABC):
    """Place where a data set is to appear; ``shown`` names it in messages.

    Methods raise DataError if the place cannot be read or written.
    """

    shown: str
    work: Work

    @abstractmethod
    def exists(self) -> bool:
        """True if something is there, other than this destination's own unfinished work."""

    @abstractmethod
    def load(self) -> Manifest:
        """The manifest of the data set that is there; DataError if it is none."""

    @abstractmethod
    def check(self, manifest: Manifest) -> None:
        """Compare the sizes of the shards with the manifest."""

    @abstractmethod
    def check_replaceable(self) -> None:
        """Refuse to replace anything but a data set, finished or not."""

    @abstractmethod
    def publish(self, replace: bool) -> None:
        """Make the data set in ``work.data`` appear, and remove the work folder."""

    def tidy(self, manifest: Manifest) -> None:  # noqa: B027
        """Remove what a prep that was killed after publishing ``manifest`` has left."""

    def claim(self) -> None:  # noqa: B027
        """Reserve the place for the work folder, which exists."""

    def release(self) -> None:  # noqa: B027
        """Give the place back, if a failure has removed the work folder."""

    def shard_folder(self, split: str) -> str | None:
        """URL of the folder that shards are moved to; None: they stay in the work folder until the end."""
        return None

    def make_room(self, jobs: Sequence[ShardJob]) -> Mapping[str, RemoteFile]:
        """Remove what is there and does not belong to these shards; returns the files that stay, if remote."""
        return {}


def destination(out: str, work: str | None = None) -> Destination:
    """The destination for ``--out`` and ``--work``."""
    return Store(out, work) if is_remote(out) else Folder(out)


class Folder(Destination):
    """A folder of this machine."""

    def __init__(self, out: str):
        self.shown, self.path = out, Path(out).absolute()
        if not self.path.name:
            raise DataError(f"--out {out}: has no name of its own; give a new folder below it")
        self.work = Work(self.path)

    def exists(self) -> bool:
        return os.path.lexists(self.path)

    def load(self) -> Manifest:
        if not (self.path / MANIFEST).is_file():
            raise DataError(f"{self.shown}: exists and is not a data set; choose another --out")
        return load_manifest(self.path)

    def check(self, manifest: Manifest) -> None:
        check_files(self.path, manifest)

    def check_replaceable(self) -> None:
        check_replaceable(self.path)

    def publish(self, replace: bool) -> None:
        self.work.publish(replace)

    def tidy(self, manifest: Manifest) -> None:
        self.work.tidy()


class Store(Destination):
    """A prefix of an object store, or a folder of any protocol of fsspec, which also knows the credentials.

    Args:
        url: of the prefix.
        work: folder to put the work folder into; None: ``prep`` in the user's cache folder.

    Raises:
        DataError: the address is none of a folder, or has a password in it.
    """

    def __init__(self, url: str, work: str | None = None):
        self.shown = self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        if parts.password is not None:
            raise DataError("out: a password in the address; give it in the way that fsspec's protocol reads it")
        if "::" in self.url or not (parts.netloc or parts.path.strip("/")) or re.search(r"[*?\[\]#]", self.url):
            raise DataError(f"out={self.url}: not the address of a folder; write s3://bucket/prefix")
        name = re.sub(r"[^\w.-]", "_", self.url.rpartition("/")[2], flags=re.ASCII)[:60]
        base = Path(work) if work is not None else default_folder() / "prep"
        key = hashlib.sha256(self.url.encode("utf-8", "surrogateescape")).hexdigest()[:12]
        self._has_claimed = False
        self.work = Work(self.url, base.absolute() / f"{name}-{key}.partial")

    def exists(self) -> bool:
        there = tree_remote(self.url)
        return bool(there) and (MANIFEST in there or UNFINISHED not in there or not self._is_mine())

    def load(self) -> Manifest:
        there = tree_remote(self.url)
        if MANIFEST in there:
            where = f"{self.url}/{MANIFEST}"
            return parse_manifest(read_remote(where), where)
        if UNFINISHED in there:
            raise DataError(
                f"{self.url}: holds unfinished work of another bd3 prep; go on with its folder (--work), or discard it "
                "with --overwrite"
            )
        raise DataError(f"{self.url}: exists and is not a data set; choose another --out")

    def check(self, manifest: Manifest) -> None:
        there = tree_remote(self.url)
        shards = {shard_path(name, shard): shard for name in manifest.splits for shard in manifest.splits[name].shards}
        for name, shard in shards.items():
            size = there[name].bytes if name in there else 0
            if size != shard.bytes:
                raise DataError(f"{self.url}/{name}: {size} bytes, the manifest says {shard.bytes}; {MEND}")

    def check_replaceable(self) -> None:
        there = tree_remote(self.url)
        manifest = read_remote(f"{self.url}/{MANIFEST}") if MANIFEST in there else b""
        known = {MANIFEST, UNFINISHED, TOKENIZER}
        extra = [name for name in there if name not in known and not _OURS.fullmatch(name)]
        if FORMAT.encode() not in manifest and (manifest or UNFINISHED not in there):
            foreign = f"it has no {MANIFEST} of ours"
        elif extra:
            foreign = f"it also holds {shorten(extra[0])}"
        else:
            return
        raise DataError(f"{self.url}: --overwrite replaces data sets only ({foreign}); choose another --out")

    def claim(self) -> None:
        path = self.work.folder / UNFINISHED
        if not path.exists():
            write_text(path, Claim(work=secrets.token_hex(8)).model_dump_json())
        upload(path, f"{self.url}/{UNFINISHED}")
        self._has_claimed = True

    def release(self) -> None:
        if self._has_claimed and not self.work.folder.exists():
            with suppress(DataError):  # the failure itself is told
                remove(f"{self.url}/{UNFINISHED}")

    def shard_folder(self, split: str) -> str | None:
        return f"{self.url}/{split}"

    def make_room(self, jobs: Sequence[ShardJob]) -> Mapping[str, RemoteFile]:
        self._check_claim()
        there = tree_remote(self.url)
        wanted = {f"{job.stream.split}/{job.name}" for job in jobs}
        stale = [name for name in there if _OURS.fullmatch(name) and name not in wanted]
        # The manifest first: what remains is no data set then.
        for name in [*([MANIFEST] if MANIFEST in there else []), *stale]:
            remove(f"{self.url}/{name}")
        return {name: file for name, file in there.items() if name in wanted}

    def publish(self, replace: bool) -> None:
        self._check_claim()
        names = [name for name in (TOKENIZER, REJECTS) if (self.work.data / name).exists()]
        for name in [*names, MANIFEST]:
            upload(self.work.data / name, f"{self.url}/{name}")
        remove(f"{self.url}/{UNFINISHED}")
        self.work.remove()

    def tidy(self, manifest: Manifest) -> None:
        if self.work.recipe() == manifest.recipe and self._is_mine():
            self.work.remove_if_idle(lambda: remove(f"{self.url}/{UNFINISHED}"))

    def _is_mine(self) -> bool:
        """True if the claim at the prefix is that of the work folder."""
        with suppress(FileNotFoundError):
            mine = (self.work.folder / UNFINISHED).read_bytes()
            if UNFINISHED in tree_remote(self.url):
                return self._claimed() == parse(mine, Claim, self.work.folder / UNFINISHED, error=DataError)
        return False

    def _claimed(self) -> Claim:
        where = f"{self.url}/{UNFINISHED}"
        return parse(read_remote(where), Claim, where, error=DataError)

    def _check_claim(self) -> None:
        if not self._is_mine():
            raise DataError(f"{self.url}: another bd3 prep has taken it meanwhile; choose another --out")
