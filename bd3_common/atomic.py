"""Atomic writers: a file or folder appears under its name once complete; until then the old one stays."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_file(path: Path, sync_folder: bool = True, durable: bool = True, suffix: str = ".tmp") -> Iterator[Path]:
    """Context of a temporary path beside ``path``, which is synced and renamed to ``path`` at the end.

    The temporary name is unique to this process, so that processes that write the same file do not interfere.
    An existing file keeps its permissions; a new one gets those of the umask. If the context raises, the temporary file
    is removed.

    Args:
        sync_folder: also sync the folder's entries; False if another file of the same folder follows.
        durable: False skips fsync, for a file that is soon rewritten: after a power failure it may be old or empty.
        suffix: suffix of the temporary name, for libraries that choose a format by it.

    Raises:
        OSError: it cannot be written; ``path`` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{unique_suffix()}{suffix}")
    try:
        yield temporary
        if path.exists():
            os.chmod(temporary, path.stat().st_mode & 0o777)
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable and sync_folder:
            sync(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@contextmanager
def atomic_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Context of a temporary folder beside ``out`` (absolute), which is renamed to ``out`` at the end.

    Parents of ``out`` are created. If the context raises, the temporary folder and the created parents are removed.
    Temporary folders that killed processes of this machine left beside ``out`` are removed, too.

    Args:
        overwrite: replace a folder that has files in it.

    Raises:
        OSError: it cannot be written, or ``out`` has files in it; ``out`` is unchanged.
    """
    folder = out.with_name(_temporary(out, "partial"))
    created: list[Path] = []
    try:
        created += [parent for parent in out.parents if not parent.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        folder.mkdir()
        yield folder
        publish_folder(folder, out, overwrite)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in created:
            with suppress(OSError):
                parent.rmdir()
        raise


def publish_folder(folder: Path, out: Path, overwrite: bool = False, aside: Path | None = None) -> None:
    """Rename a finished folder to ``out``, on the same file system, and sync it and its parent.

    Args:
        overwrite: replace a folder that has files in it.
        aside: new place of the replaced folder, which the caller removes; None: it is removed.

    Raises:
        OSError: ``out`` has files in it, and ``overwrite`` is false or another process has just written them.
    """
    sync(folder)
    replaced = aside or out.with_name(_temporary(out, "replaced"))
    replaces = overwrite and out.exists()
    if replaces:
        shutil.rmtree(replaced, ignore_errors=True)  # of a process that was killed after publishing
        out.rename(replaced)
    try:
        folder.rename(out)
    except OSError:
        if replaces:
            replaced.rename(out)
        raise
    sync(out.parent)
    if replaces and aside is None:
        shutil.rmtree(replaced, ignore_errors=True)


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a whole file atomically; ``durable`` as in :func:`atomic_file`."""
    with atomic_file(path, durable=durable) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Write a whole UTF-8 text file atomically; ``durable`` as in :func:`atomic_file`."""
    write_bytes(path, text.encode(), durable)


def unique_suffix() -> str:
    """Part of a file name that no other process uses; a process id alone is not unique across hosts."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(out: Path, kind: str) -> str:
    return f".{out.name}.{kind}-{os.getpid()}@{socket.gethostname()}"


def _remove_leftovers(out: Path) -> None:
    """Remove temporary folders of killed processes beside ``out``.

    Names hold the host, because on a shared file system a process id is not unique.
    """
    pattern = re.compile(re.escape(f".{out.name}.") + r"(?:partial|replaced)-(\d+)(?:@(.*))?")
    for path in out.parent.iterdir():
        found = pattern.fullmatch(path.name)
        if found and found[2] in (None, socket.gethostname()) and not _other_process(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _other_process(pid: int) -> bool:
    """True if ``pid`` is alive on this machine and not this process."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
