"""Watch over a call: what it writes or starts, how long it takes, how much memory it fills, how it ends."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bd3_common.errors import UserError, user_line
from bd3_common.text import printable

SECONDS = 120
"""of the clock, after which a call is taken to wait for ever; a busy machine gives a tenth of its time"""
CPU_SECONDS = 5.0
MEMORY = 1 << 30
"""bytes of address space that a call may add"""
_STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty"}
_STARTS |= {"socket.connect", "socket.bind", "pickle.find_class", "shutil.unpack_archive"}
_PICKLED = ("torch.", "collections", "megatron.")
"""modules of the classes that checkpoints of earlier versions name"""
_CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown"}
_CHANGES |= {"os.truncate", "os.utime", "shutil.rmtree", "shutil.move", "shutil.copyfile"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Audit hook of the process, which cannot be removed; it looks only inside :meth:`over`."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.outside = ""
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def over(self, root: Path, outside: Path) -> Iterator[list[str]]:
        """Collect what happens outside of ``root``: writes and starts anywhere, reads below ``outside``."""
        self.seen, self.outside, self.root = [], str(outside), os.path.realpath(root)
        # The first import of a module would write it compiled, beside its source.
        before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            yield self.seen
        finally:
            self.root, sys.dont_write_bytecode = None, before

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.root is None:
            return
        if event in _STARTS and not (event == "pickle.find_class" and str(args[0]).startswith(_PICKLED)):
            self.seen.append(f"{event} {args!r:.200}")
        elif event == "open":
            path, _, flags = args
            if isinstance(path, str | bytes):
                text = os.fsdecode(path)
                if isinstance(flags, int) and flags & _WRITES and not self._inside(text) and text != os.devnull:
                    self.seen.append(f"open {text} to write")
                elif self.outside in os.path.normpath(text):
                    self.seen.append(f"open {text}")
        elif event in _CHANGES:
            folder = args[-1] if len(args) > 1 and isinstance(args[-1], int) and args[-1] >= 0 else None
            for path in args[:2]:
                if isinstance(path, str | bytes | os.PathLike):
                    base = "" if folder is None else os.readlink(f"/proc/self/fd/{folder}")
                    if not self._inside(os.path.join(base, os.fsdecode(path))):
                        self.seen.append(f"{event} {path!r}")

    def _inside(self, path: str) -> bool:
        parent, name = os.path.split(os.path.abspath(path))
        place = f"{os.path.realpath(parent)}/{name}"
        return place == self.root or place.startswith(f"{self.root}/")


def outcome(call: Callable[[], object]) -> str | None:
    """Run a call; None if it succeeds or ends in one proper line, else the fault."""
    previous = signal.signal(signal.SIGALRM, _too_long)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    begin = time.process_time()
    try:
        call()
    except (UserError, OSError) as error:
        signal.alarm(0)
        line = user_line(error)
        if line is None:
            return f"no line for {error!r}"
        if line != printable(line) or len(line) > 2000:
            return f"not a printable line: {line[:300]!r}"
    except BaseException as error:
        signal.alarm(0)
        if isinstance(error, KeyboardInterrupt | GeneratorExit):
            raise
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else "?"
        return f"{type(error).__name__} at {where}: {str(error)[:200]!r}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    spent = time.process_time() - begin
    return f"took {spent:.1f} CPU seconds" if spent > CPU_SECONDS else None


class _Waits(BaseException):
    """The call did not end."""


def _too_long(*_: object) -> None:
    raise _Waits(f"no end within {SECONDS} s")
