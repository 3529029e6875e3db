"""The `bd3` command: a table of commands, and the one place where a user's mistake becomes one line.

Nothing heavy is imported before a command is chosen, so that ``bd3 --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import re
import sys
import time

from bd3_common import logs, plugins
from bd3_common.errors import user_line
from bd3_common.exit_codes import INTERRUPTED, PIPE_CLOSED, USAGE_ERROR
from bd3_common.safe_path import safe_path
from bd3_common.text import printable, redacted, shorten
from pretrain.resilience import signals

# Name -> (module:function, help). A function takes the arguments after the name and may return an exit code.
COMMANDS = {
    "prep": ("pretrain.commands.prep:main", "tokenize and pack text into a data set of shards"),
    "check": ("pretrain.commands.check:main", "verify a data set and show what is in it"),
    "pretrain": ("pretrain.commands.pretrain:main", "train a model, or continue a run"),
    "preflight": (
        "pretrain.commands.preflight:main",
        "check nodes, links, folders and data before a run, and start nothing",
    ),
    "eval": ("pretrain.commands.eval:main", "evaluate a run's checkpoint on the validation split"),
    "compare": ("pretrain.commands.compare:main", "compare runs on the same rows and noise"),
    "sample": ("pretrain.commands.sample:main", "generate text block by block"),
    "convert": ("pretrain.commands.convert:main", "to and from Hugging Face folders; upgrade old checkpoints"),
    "config": ("pretrain.commands.config:main", "print the resolved configuration as YAML"),
    "estimate": ("pretrain.commands.estimate:main", "predict memory, traffic and time of a run before it is launched"),
    "launch": ("pretrain.commands.launch:main", "submit a run, a sweep or a data preparation to Slurm"),
    "status": ("pretrain.commands.status:main", "show the status of a run in Slurm and in training"),
    "attempt": ("pretrain.commands.attempt:main", "start a run in a batch script, and again where that helps"),
    "bench": ("pretrain.bench:main", "measure data, a training step, its memory, and layouts against one process"),
}

# Launchers kill all ranks when one has exited: the others leave rank 0 this long to print the error.
RANK_0_PRINTS = 5.0  # seconds


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the process's exit code.

    2 after a user's mistake (one line on stderr), 130 after Ctrl-C, 141 when the reader of a pipe went away.
    Any other exception is a bug and propagates with its traceback.
    """
    args = sys.argv[1:] if argv is None else argv
    with contextlib.suppress(AttributeError, ValueError):  # a stream of a caller's own
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with safe_path():
            code = _run(plugins.take_option(args))
        sys.stdout.flush()
    except SystemExit as stop:
        code = _exit_code(stop)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit complains
        code = PIPE_CLOSED
    except Exception as error:
        line = user_line(error)
        if line is None:
            raise
        _tell(line, getattr(error, "collective", False))
        code = USAGE_ERROR
    return code


def _tell(line: str, collective: bool) -> None:
    """Print a line; an error that all ranks raise is printed by rank 0 alone."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank == "0" or not re.fullmatch("[0-9]{1,9}", rank):  # a number that is none is the mistake, and in the line
        print(line, file=sys.stderr)
    elif collective:
        time.sleep(RANK_0_PRINTS)
    else:
        print(f"rank {rank}: {line}", file=sys.stderr)


def usage() -> str:
    """The text of ``bd3 --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: bd3 [{plugins.OPTION} MODULE] COMMAND [OPTIONS]",
            "",
            "Pretraining of block diffusion language models on Megatron-core.",
            "",
            *lines,
            "",
            f"{plugins.OPTION} MODULE: {plugins.HELP}. It may stand before or after the command.",
            "bd3 COMMAND --help lists a command's options; bd3 --version prints the version.",
        ]
    )


def version() -> str:
    """The installed version of the package."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("bd3-megatron")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else USAGE_ERROR
    name, *rest = args
    if name in ("-V", "--version"):
        print(f"bd3-megatron {version()}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(COMMANDS)}"
        print(f"{shorten(name)}: unknown command; {hint}", file=sys.stderr)
        return USAGE_ERROR
    logs.to_console()
    module, _, function = COMMANDS[name][0].partition(":")
    with signals.caught() if name == "pretrain" else contextlib.nullcontext():
        return getattr(importlib.import_module(module), function)(rest) or 0


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(redacted(printable(str(stop.code), keep="\n")), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
