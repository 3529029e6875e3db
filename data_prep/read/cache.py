"""Local cache of remote shards: fetched whole, verified, shared by all processes, bounded in size."""

from __future__ import annotations

import fcntl
import os
import queue
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from bd3_common.atomic import no_follow, refuse_link
from data_prep.errors import DataError
from data_prep.format.files import lies_at, sha256_file
from data_prep.format.remote import PARTIAL, fetch
from data_prep.read.open_files import ShardFile

FETCHERS = 4  # background threads of a process
WAIT = 0.1  # seconds between checks for space that other fetches have reserved
_TRIES = 20  # evictions of a shard between its fetch and its use, in a row, after which the cache is too small


FOLDER = "bd3-shards"
"""sub-folder of a cache that holds all its files"""
_SHA256 = r"[0-9a-f]{64}"
_SHARD, _CLAIM = re.compile(rf"{_SHA256}\.tar"), re.compile(rf"{_SHA256}\.claim")
_COPY = re.compile(rf"\.(?P<sha256>{_SHA256})\.tar\..+{re.escape(PARTIAL)}")


class RemoteShard(NamedTuple):
    """A remote shard, its size and its sha256."""

    url: str
    bytes: int
    sha256: str


class ShardCache:
    """Shards named by sha256 in a sub-folder of a cache, to be shared by all processes of a machine.

    Other files of the folder, and of the sub-folder, are never touched, and links are not followed.

    A shard is written under a temporary name, compared with its size and sha256, and renamed; a lock per shard lets one
    process fetch it while the others wait. Before a fetch, the least recently used shards are evicted until the new one
    fits. Shards being fetched count, so that the folder never exceeds ``limit_bytes``. Each process verifies a shard
    that it finds in the cache once, and fetches it again if it is damaged.

    Args:
        folder: folder of the sub-folder, created if missing; on a local disk, because the locks need one.
        limit_bytes: limit on the total size of the shards.
        tries: tries of a fetch (see :func:`data_prep.format.remote.fetch`).

    Raises:
        DataError: the folder cannot be written, or is a link.
    """

    def __init__(self, folder: str | Path, limit_bytes: int, tries: int = 5):
        try:
            given = Path(folder).expanduser()
        except RuntimeError:
            raise DataError(f"data.cache={folder}: there is no such user; write the folder's path") from None
        self.given, self.folder, self.limit, self.tries = given, given / FOLDER, int(limit_bytes), tries
        for path in (given, self.folder):
            refuse_link(path, "data.cache", DataError)
        self._checked: set[str] = set()
        self._coming: dict[str, Future[Path]] = {}
        self._asked: queue.SimpleQueue[tuple[RemoteShard, Future[Path]]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / ".lock"):
                pass

    @contextmanager
    def opened(self, shard: RemoteShard) -> Iterator[ShardFile]:
        """The shard's file, open inside the context; it stays readable there even if the shard is evicted meanwhile.

        Raises:
            DataError: it cannot be fetched, differs from the manifest, or is larger than the cache.
        """
        self._settle(shard)
        file = self._open(shard)
        try:
            yield file
        finally:
            file.close()

    def _open(self, shard: RemoteShard) -> ShardFile:
        for _ in range(_TRIES):
            path = self.ensure(shard)
            with suppress(FileNotFoundError):
                os.utime(path)  # used just now
                if path.stat().st_size == shard.bytes:
                    with suppress(_Evicted):
                        return _opened(path, shard.bytes)
                else:  # truncated after it was verified
                    path.unlink()
        raise DataError(
            f"{shard.url}: evicted from {self.given} before it could be read, {_TRIES} times; "
            "raise the limit of the cache (data.cache_gb)"
        )

    def ensure(self, shard: RemoteShard) -> Path:
        """Return the path of the shard in the folder, fetched if it is missing, and verified.

        Raises:
            DataError: as :meth:`opened`.
        """
        if not re.fullmatch(_SHA256, shard.sha256):
            raise DataError(f"{shard.url}: {shard.sha256!r} is no sha256; copy the data set's manifest.json again")
        path = self.folder / f"{shard.sha256}.tar"
        if shard.sha256 in self._checked and path.exists():
            return path
        if shard.bytes > self.limit:
            raise DataError(
                f"{shard.url}: {shard.bytes} bytes, more than the cache {self.given} may hold ({self.limit}); "
                "raise its limit (data.cache_gb)"
            )
        with self._writing(), _locked(self._claim(shard.sha256), remove=True) as handle:
            if path.is_symlink() or (path.exists() and not self._is_good(path, shard)):
                path.unlink(missing_ok=True)
            if not path.exists():
                self._reserve(handle, shard)
                fetch(shard.url, path, shard.bytes, shard.sha256, self.tries)
        self._checked.add(shard.sha256)
        return path

    def prefetch(self, shards: list[RemoteShard]) -> None:
        """Fetch these in the background, in this order. :meth:`opened` raises the error of a shard that failed."""
        for shard in shards:
            path = self.folder / f"{shard.sha256}.tar"
            earlier = self._coming.get(shard.sha256)
            if earlier is not None and not (earlier.done() and earlier.exception() is None):
                continue  # being fetched, or failed and not yet raised
            if shard.sha256 in self._checked and path.exists():
                continue
            future: Future[Path] = Future()
            self._coming[shard.sha256] = future
            self._asked.put((shard, future))
            if len(self._threads) < FETCHERS:
                # Daemons, so that a fetch in its retries does not keep a failed process alive.
                self._threads.append(threading.Thread(target=self._work, name="shard fetcher", daemon=True))
                self._threads[-1].start()

    def _work(self) -> None:
        while True:
            shard, future = self._asked.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self.ensure(shard))
                except BaseException as error:  # raised where the shard is opened
                    future.set_exception(error)

    def _settle(self, shard: RemoteShard) -> None:
        """Wait for the background fetch of this shard; cancel it if it has not begun, so that the caller fetches."""
        future = self._coming.pop(shard.sha256, None)
        if future is not None and not future.cancel():
            future.result()

    def _is_good(self, path: Path, shard: RemoteShard) -> bool:
        try:
            return path.stat().st_size == shard.bytes and sha256_file(path) == shard.sha256
        except FileNotFoundError:  # evicted meanwhile
            return True

    def _reserve(self, handle: int, shard: RemoteShard) -> None:
        """Evict until the shard fits, and reserve its size by growing the claim file (sparse) to it."""
        while True:
            with _locked(self.folder / ".lock"):
                kept, total = self._scan()
                while kept and total + shard.bytes > self.limit:
                    _, size, path = kept.pop(0)
                    path.unlink(missing_ok=True)
                    total -= size
                if total + shard.bytes <= self.limit:
                    os.ftruncate(handle, shard.bytes)
                    return
            time.sleep(WAIT)

    def _scan(self) -> tuple[list[tuple[int, int, Path]], int]:
        """((last use, bytes, path) of the shards here, oldest first; bytes of these and of reserved ones)."""
        kept, total = [], 0
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode):
                    continue
                if _SHARD.fullmatch(entry.name):
                    kept.append((status.st_mtime_ns, status.st_size, path))
                elif _CLAIM.fullmatch(entry.name):
                    if self._is_abandoned(path):
                        continue
                elif copy := _COPY.fullmatch(entry.name):  # counted by its claim
                    if self._is_abandoned(self._claim(copy["sha256"])):
                        path.unlink()
                    continue
                else:
                    continue
                total += status.st_size
        return sorted(kept), total

    def _claim(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.claim"

    @staticmethod
    def _is_abandoned(claim: Path) -> bool:
        """True if no process holds the claim any more; the claim is then removed."""
        try:
            handle = no_follow(claim, os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            claim.unlink(missing_ok=True)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(handle)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.given}: the shard cache cannot be written ({error.strerror or error}); "
                "free space or give another folder (data.cache)"
            ) from None


class _Evicted(Exception):
    pass


def _opened(path: Path, size: int) -> ShardFile:
    try:
        return ShardFile(path, size, "it is fetched again at the next start")
    except DataError:
        if path.exists():
            raise
        raise _Evicted from None


@contextmanager
def _locked(path: Path, remove: bool = False) -> Iterator[int]:
    """Hold the lock of a file, which is created if missing; with ``remove`` the file is deleted on release."""
    while True:
        handle = no_follow(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if lies_at(handle, path):
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # it was removed while this process waited for it
    try:
        yield handle
    finally:
        if remove:
            path.unlink(missing_ok=True)
        os.close(handle)


def default_folder(environment: Callable[[str], str | None] = os.environ.get) -> Path:
    """``$BD3_CACHE``, else ``~/.cache/bd3-megatron``."""
    return Path(environment("BD3_CACHE") or "~/.cache/bd3-megatron").expanduser()
