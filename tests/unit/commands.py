"""The `bd3` command in processes of its own that can be killed, without the seconds that its imports take.

A server process imports the program once; every command is a fork of it that does what the console script does.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from pretrain.distributed.spawn import FORKS

_COMMANDS = ("prep", "pretrain", "eval", "sample", "convert")
# Imports of commands inside of functions.
_LATE = [
    "bd3_megatron.sampling.block",
    "bd3_megatron.sampling.sampler",
    "data_prep.build.estimate",
    "matplotlib.pyplot",
    "pretrain.checkpoint.loaded_run",
    "pretrain.preflight.run",
    "pretrain.trainer.loop",
    "tokenizers",
    "torch.utils.tensorboard",
]
FORKS.set_forkserver_preload([f"pretrain.commands.{name}" for name in _COMMANDS] + _LATE)


_HEAD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank \d+( [A-Z]+)?: ")


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def messages(self) -> list[str]:
        """Lines of ``err`` without time, rank and level."""
        return [_HEAD.sub("", line) for line in self.err.splitlines()]


def start(*args: object, log: Path, before: Callable[[], None] | None = None, parent: bool = False) -> BaseProcess:
    """Start ``bd3 args``; what it prints goes to ``log.out`` and ``log.err``.

    Args:
        before: called in the new process first, to prepare what the command will meet there.
        parent: whether it may start processes of its own (it then outlives a test that forgets it).
    """
    process = FORKS.Process(target=_main, args=([str(arg) for arg in args], str(log), before), daemon=not parent)
    process.start()
    return process


def bd3(*args: object, log: Path, before: Callable[[], None] | None = None, parent: bool = False) -> Done:
    """Run ``bd3 args`` to its end; arguments as of :func:`start`."""
    process = start(*args, log=log, before=before, parent=parent)
    process.join()
    out, err = (log.with_suffix(end).read_text(errors="replace") for end in (".out", ".err"))
    return Done(process.exitcode, out, err)


def die_at(module: str, name: str, call: int) -> None:
    """Kill this process, as ``kill -9`` would, when ``module.name`` is called for the ``call``-th time."""
    *owners, function = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, count = getattr(owner, function), itertools.count(1)

    @functools.wraps(original)
    def deadly(*args, **options):
        if next(count) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(owner, function, deadly)


def limit_files(size: int) -> None:
    """No file of this process may grow over ``size`` bytes: a full disk, near enough."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _main(args: list[str], log: str, before: Callable[[], None] | None) -> None:
    for end, descriptor in ((".out", 1), (".err", 2)):
        file = os.open(log + end, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    from pretrain.cli import main

    if before is not None:
        before()
    sys.exit(main(args))
