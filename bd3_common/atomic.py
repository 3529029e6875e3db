"""Atomic writers: a file or folder appears under its name once complete; until then the old one stays.

Files are created under random names and never through a link. A writer holds a lock on what it writes; what is not
locked was left by a killed one, and the next writer beside it removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bd3_common.errors import UserError

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
_TRIES = 100
_swept: set[tuple[int, int]] = set()
"""folders (device, inode) in which this process has removed temporary files of killed writers"""


@contextmanager
def atomic_file(
    path: Path, sync_folder: bool = True, durable: bool = True, suffix: str = ".tmp", mode: int = 0o666
) -> Iterator[Path]:
    """Context of a new empty file beside ``path``, which is synced and renamed to ``path`` at the end.

    Its name is random, so that processes that write the same file do not interfere. An existing file keeps its
    permissions; a link is replaced, not followed. If the context raises, the new file is removed.

    Args:
        sync_folder: also sync the folder's entries; False if another file of the same folder follows.
        durable: False skips fsync, for a file that is soon rewritten: after a power failure it may be old or empty.
        suffix: suffix of the temporary name, for libraries that choose a format by it.
        mode: permissions of a new file, less those that the umask forbids.

    Raises:
        OSError: it cannot be written; ``path`` is unchanged.
    """
    _sweep_files(path.parent)
    temporary, handle = _created(path, suffix, mode)
    try:
        yield temporary
        _check_regular(temporary)
        with suppress(FileNotFoundError):
            old = path.lstat()
            if stat.S_ISREG(old.st_mode):
                os.chmod(temporary, old.st_mode & 0o777)
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable and sync_folder:
            sync(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
        os.close(handle)


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Context of a temporary folder beside ``out`` (absolute), which is renamed to ``out`` at the end.

    Parents of ``out`` are created. If the context raises, the temporary folder and the created parents are removed.
    Temporary folders that killed processes of this machine left beside ``out`` are removed, too.

    Raises:
        OSError: it cannot be written, or ``out`` has files in it; ``out`` is unchanged.
    """
    created: list[Path] = []
    folder, handle = None, -1
    try:
        created += [parent for parent in out.parents if not parent.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep_folders(out)
        folder, handle = _created_folder(out)
        yield folder
        publish_folder(folder, out)
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in created:
            with suppress(OSError):
                parent.rmdir()
        raise
    finally:
        if handle >= 0:
            os.close(handle)


def publish_folder(folder: Path, out: Path, overwrite: bool = False, aside: Path | None = None) -> None:
    """Rename a finished folder to ``out``, on the same file system, and sync it and its parent.

    Args:
        overwrite: replace a folder that has files in it.
        aside: new place of the replaced folder, which the caller removes.

    Raises:
        OSError: ``out`` has files in it, and ``overwrite`` is false or another process has just written them.
    """
    sync(folder)
    replaced = aside if overwrite and out.exists() else None
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)  # of a process that was killed after publishing
        out.rename(replaced)
    try:
        folder.rename(out)
    except OSError:
        if replaced is not None:
            replaced.rename(out)
        raise
    sync(out.parent)


def write_bytes(path: Path, content: bytes, durable: bool = True, mode: int = 0o666) -> None:
    """Write a whole file atomically; ``durable`` and ``mode`` as in :func:`atomic_file`."""
    try:
        with atomic_file(path, durable=durable, mode=mode) as temporary:
            handle = no_follow(temporary, os.O_WRONLY)
            try:
                write_all(handle, content)
            finally:
                os.close(handle)
    except OSError as error:
        if error.filename is None:  # errors of writes name no file
            error.filename = str(path)
        raise


def write_text(path: Path, text: str, durable: bool = True, mode: int = 0o666) -> None:
    """Write a whole UTF-8 text file atomically; ``durable`` and ``mode`` as in :func:`atomic_file`."""
    write_bytes(path, text.encode(), durable, mode)


def write_all(handle: int, content: bytes) -> None:
    """Write all of ``content`` to an open file: a single write may take a part of it only, as on a full disk.

    Raises:
        OSError: it cannot be written; a part may have been.
    """
    left = memoryview(content)
    while left:
        count = os.write(handle, left)
        if count == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left = left[count:]


def open_append(path: Path, mode: int = 0o666) -> int:
    """Descriptor of a file to append to, created if it is missing; a link is not followed.

    Raises:
        OSError: it is a link, or cannot be written.
    """
    return os.open(path, _APPEND, mode)


def no_follow(path: str | os.PathLike[str], flags: int) -> int:
    """Descriptor of a file, not following a link at the end of ``path``; an ``opener`` for :func:`open`."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def refuse_link(folder: Path, name: str, error: type[UserError]) -> None:
    """Check that a folder to write into is not itself a link; links above it are common and fine.

    Args:
        name: names the folder in the error, for example ``run``.
        error: class to raise.

    Raises:
        UserError: of class ``error``: one line with the link's target.
    """
    if folder.is_symlink():
        target = os.readlink(folder)
        raise error(f"{name}={folder}: is a link to {target}; give the folder itself, nothing is written through links")


def unique_suffix() -> str:
    """Part of a file name that no other process uses; a process id alone is not unique across hosts."""
    return f"{os.getpid()}-{secrets.token_hex(8)}"


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Temporary names end with process, host and a random part: .<name>.<pid>-<host>-<random><suffix> of files,
# .<name>.partial-<pid>-<host>-<random> of folders. Folders of earlier versions, .<name>.partial-<pid>@<host>, have no
# lock.
_FILE_NAME = re.compile(r"\..+\.(?P<pid>\d+)-(?P<host>[0-9a-f]{8})-[0-9a-f]{16}(?:\.\w+)?")


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _unique() -> str:
    return f"{os.getpid()}-{_host()}-{secrets.token_hex(8)}"


def _created(path: Path, suffix: str, mode: int) -> tuple[Path, int]:
    """A new empty file beside ``path``, and a descriptor that locks it."""
    for _ in range(_TRIES):
        temporary = path.with_name(f".{path.name}.{_unique()}{suffix}")
        try:
            handle = os.open(temporary, _NEW, mode)
        except OSError as error:
            error.filename = str(path)
            raise
        if _lock(handle, temporary):
            return temporary, handle
        os.close(handle)
    raise FileExistsError(errno.EEXIST, "its temporary files are removed", str(path))


def _created_folder(out: Path) -> tuple[Path, int]:
    """A new empty folder beside ``out``, and a descriptor that locks it."""
    for _ in range(_TRIES):
        folder = out.with_name(f".{out.name}.partial-{_unique()}")
        folder.mkdir()
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        if _lock(handle, folder):
            return folder, handle
        os.close(handle)
    raise FileExistsError(errno.EEXIST, "its temporary folders are removed", str(out))


def _lock(handle: int, path: Path) -> bool:
    """Lock a new file; False if another process took it for a leftover before that."""
    with suppress(OSError):  # a file system without locks: others go by the process id
        fcntl.flock(handle, fcntl.LOCK_EX)
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.lstat())
    return False


def _check_regular(path: Path) -> None:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _sweep_files(folder: Path) -> None:
    """Remove temporary files of killed writers in a folder, once for each process."""
    with suppress(OSError):
        found = folder.stat()
        if (key := (found.st_dev, found.st_ino)) in _swept:
            return
        _swept.add(key)
        with os.scandir(folder) as entries:
            left = [Path(entry.path) for entry in entries if _FILE_NAME.fullmatch(entry.name)]
        for path in left:
            name = _FILE_NAME.fullmatch(path.name)
            if name is not None and name["host"] == _host():
                _remove_if_left(path, int(name["pid"]), stat.S_ISREG)


def _sweep_folders(out: Path) -> None:
    """Remove temporary folders of killed processes beside ``out``; those of other hosts are left alone."""
    begin = re.escape(f".{out.name}.")
    ours = re.compile(rf"{begin}partial-(?P<pid>\d+)-{_host()}-[0-9a-f]{{16}}")
    earlier = re.compile(rf"{begin}(?:partial|replaced)-(?P<pid>\d+)(?:@{re.escape(socket.gethostname())})?")
    for path in list(out.parent.iterdir()):
        name = ours.fullmatch(path.name)
        if name is None and (name := earlier.fullmatch(path.name)) and _is_alive(int(name["pid"])):
            continue
        if name is not None:
            _remove_if_left(path, int(name["pid"]), stat.S_ISDIR)


def _remove_if_left(path: Path, pid: int, kind: Callable[[int], bool]) -> None:
    """Remove a temporary file or folder of this user and host, unless its writer is alive."""
    with suppress(OSError):
        found = path.lstat()
        if not kind(found.st_mode) or found.st_uid != os.geteuid():
            return
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not os.path.samestat(os.fstat(handle), found) or not _is_left(handle, pid):
                return
            if stat.S_ISDIR(found.st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        finally:
            os.close(handle)


def _is_left(handle: int, pid: int) -> bool:
    """True if nobody holds the lock of an open file; without locks, if its writer's process is gone."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return not _is_alive(pid)
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
