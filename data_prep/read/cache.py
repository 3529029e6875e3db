"""Shards of remote data sets on the local disk: fetched whole, checked, shared by all processes, bounded in size."""

from __future__ import annotations

import fcntl
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from data_prep.errors import DataError
from data_prep.format.files import lies_at, sha256_file
from data_prep.format.remote import PARTIAL, fetch
from data_prep.read.open_files import ShardFile

FETCHERS = 4  # background threads of a process
WAIT = 0.1  # seconds between looks for space that other fetches hold
_TRIES = 20  # a shard evicted between its fetch and its use, so many times running, means that the cache is too small


class RemoteShard(NamedTuple):
    """A file elsewhere and what its bytes must be."""

    url: str
    bytes: int
    sha256: str


class ShardCache:
    """A folder of shards named by sha256, to be shared by all processes of a machine.

    A shard comes under a temporary name, is checked in size and sha256 and then renamed; a lock per shard lets one
    process fetch it while the others wait. Before a fetch the shards used longest ago are removed until the new one
    fits, counting those that are being fetched, so that the folder never holds more than ``limit_bytes``. A shard
    that was there before is checked once by each process that uses it, and fetched again if it is damaged.

    Args:
        folder: made if it is not there; on a disk of this machine, because locks need one.
        limit_bytes: what its files may take together.
        attempts: how often a fetch is tried (see :func:`data_prep.format.remote.fetch`).

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, limit_bytes: int, attempts: int = 5):
        self.folder, self.limit, self.attempts = Path(folder).expanduser(), int(limit_bytes), attempts
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
        """The shard's file, open in the block; it can be read there even if the shard is evicted meanwhile.

        Raises:
            DataError: it cannot be fetched, is not what the manifest says, or is bigger than the cache.
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
                else:  # cut after it was checked
                    path.unlink()
        raise DataError(
            f"{shard.url}: evicted from {self.folder} before it could be read, {_TRIES} times; "
            "raise the limit of the cache (data.cache_gb)"
        )

    def ensure(self, shard: RemoteShard) -> Path:
        """Have the shard in the folder, whole and checked, and return its path.

        Raises:
            DataError: as :meth:`opened`.
        """
        path = self.folder / f"{shard.sha256}.tar"
        if shard.sha256 in self._checked and path.exists():
            return path
        if shard.bytes > self.limit:
            raise DataError(
                f"{shard.url}: {shard.bytes} bytes, more than the cache {self.folder} may hold ({self.limit}); "
                "raise its limit (data.cache_gb)"
            )
        with self._writing(), _locked(self._claim(shard.sha256), remove=True) as handle:
            if path.exists() and not self._is_good(path, shard):
                path.unlink()
            if not path.exists():
                self._reserve(handle, shard)
                fetch(shard.url, path, shard.bytes, shard.sha256, self.attempts)
        self._checked.add(shard.sha256)
        return path

    def prefetch(self, shards: list[RemoteShard]) -> None:
        """Fetch these in the background, in this order. What fails is raised by :meth:`opened` of that shard."""
        for shard in shards:
            path = self.folder / f"{shard.sha256}.tar"
            earlier = self._coming.get(shard.sha256)
            if earlier is not None and not (earlier.done() and earlier.exception() is None):
                continue  # on its way, or failed and not told yet
            if shard.sha256 in self._checked and path.exists():
                continue
            future: Future[Path] = Future()
            self._coming[shard.sha256] = future
            self._asked.put((shard, future))
            if len(self._threads) < FETCHERS:
                # Daemons: a fetch that is tried again and again must not keep a process that fails from ending.
                self._threads.append(threading.Thread(target=self._work, name="shard fetcher", daemon=True))
                self._threads[-1].start()

    def _work(self) -> None:
        while True:
            shard, future = self._asked.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self.ensure(shard))
                except BaseException as error:  # belongs to whoever asks for the shard
                    future.set_exception(error)

    def _settle(self, shard: RemoteShard) -> None:
        """Wait for the background's fetch of this shard, or take it over where it has not begun."""
        future = self._coming.pop(shard.sha256, None)
        if future is not None and not future.cancel():
            future.result()

    def _is_good(self, path: Path, shard: RemoteShard) -> bool:
        try:
            return path.stat().st_size == shard.bytes and sha256_file(path) == shard.sha256
        except FileNotFoundError:  # evicted meanwhile
            return True

    def _reserve(self, handle: int, shard: RemoteShard) -> None:
        """Make room; the claim's file, grown to the size of the shard (as a hole), stands for what comes."""
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
        """((last use, bytes, path) of the shards here, oldest first; bytes of these and of those on their way)."""
        kept, total = [], 0
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            with suppress(FileNotFoundError):
                status = entry.stat()
                if path.suffix == ".tar":
                    kept.append((status.st_mtime_ns, status.st_size, path))
                elif path.suffix == ".claim":
                    if self._is_abandoned(path):
                        continue
                elif path.suffix == PARTIAL:  # .<sha256>.tar.<process>.partial, counted by its claim
                    if self._is_abandoned(self._claim(path.name[1:65])):
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
        """Whether nobody holds the claim any more; if so, it is removed."""
        try:
            handle = os.open(claim, os.O_RDWR)
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
                f"{self.folder}: the shard cache cannot be written ({error.strerror or error}); "
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
    """Hold the lock of a file, made if need be; with ``remove`` the file goes when the lock does."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
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
