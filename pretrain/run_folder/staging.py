"""A folder written all or nothing: built beside its place under another name, moved there by one rename."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bd3_common.atomic import sync
from data_prep.errors import DataError


@contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """A sibling folder that becomes ``out`` (absolute) if the block succeeds and is removed if it does not.

    Parents of ``out`` are created as needed, and removed again on failure.

    Raises:
        DataError: the disk refuses, before the block or in it.
    """
    folder = out.with_name(f".{out.name}.partial-{os.getpid()}@{socket.gethostname()}")
    created: list[Path] = []
    try:
        created += [parent for parent in out.parents if not parent.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        folder.mkdir()
        yield folder
        _publish(folder, out, overwrite)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in created:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise DataError(
                f"{out}: cannot be written ({error.strerror or error}); "
                "make room, check the rights, or choose another folder"
            ) from None
        raise


def _publish(folder: Path, out: Path, overwrite: bool) -> None:
    sync(folder)
    aside = None
    if overwrite and out.exists():
        aside = folder.with_name(folder.name.replace(".partial-", ".replaced-"))
        out.rename(aside)
    try:
        folder.rename(out)  # fails if another process has put a data set there meanwhile
    except OSError:
        if aside:
            aside.rename(out)
        raise
    sync(out.parent)
    if aside:
        shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Remove what killed runs for the same ``out`` have left.

    On a shared file system a process id means nothing to another host, hence the host in the name.
    """
    pattern = re.compile(re.escape(f".{out.name}.") + r"(?:partial|replaced)-(\d+)(?:@(.*))?")
    for path in out.parent.iterdir():
        found = pattern.fullmatch(path.name)
        if found and found[2] in (None, socket.gethostname()) and not _other_process(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _other_process(pid: int) -> bool:
    """Whether ``pid`` is alive on this machine and not this process."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
