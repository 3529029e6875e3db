"""The `bd3` command: a table of commands, and the one place where a user's mistake becomes one line.

Nothing heavy is imported before a command is chosen, so that ``bd3 --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import os
import sys
import time

from pretrain import signals

# Name -> (module:function, help). A function takes the arguments after the name and may return an exit code.
COMMANDS = {
    "prep": ("pretrain.prepare:main", "tokenize and pack text into a data set of shards"),
    "check": ("pretrain.check:main", "verify a data set and show what is in it"),
    "pretrain": ("pretrain.train:main", "train a model, or continue a run"),
    "preflight": ("pretrain.preflight:main", "check nodes, links, folders and data before a run, and start nothing"),
    "eval": ("pretrain.evaluate:main", "evaluate a run's checkpoint on the validation split"),
    "sample": ("pretrain.generate:main", "generate text block by block"),
    "convert": ("pretrain.convert:main", "export to and import from Hugging Face folders"),
    "config": ("pretrain.load:main", "print the resolved configuration as YAML"),
    "estimate": ("pretrain.estimate:main", "predict memory, traffic and time of a run before it is launched"),
    "launch": ("pretrain.launch:main", "submit a run, a sweep or a data preparation to Slurm"),
    "status": ("pretrain.status:main", "show where a run stands in Slurm and in training"),
    "attempt": ("pretrain.attempt:main", "start a run in a batch script, and again where that helps"),
    "bench": ("pretrain.bench:main", "measure data, a training step, its memory, and whether layouts agree"),
}

USAGE_ERROR = 2
INTERRUPTED = 130
PIPE_CLOSED = 141

# Launchers end all ranks when one has ended: the others leave the first rank time to say why.
FIRST_SPEAKS = 5.0  # seconds

WRITE_ERRORS = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the process's exit code.

    2 after a user's mistake (one line on stderr), 130 after Ctrl-C, 141 when the reader of a pipe went away.
    Any other exception is a bug and propagates with its traceback.
    """
    args = sys.argv[1:] if argv is None else argv
    try:
        code = _run(args)
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
        _tell(line, getattr(error, "everywhere", False))
        code = USAGE_ERROR
    return code


def _tell(line: str, everywhere: bool) -> None:
    """Print a line, or leave it to the first of many ranks when all have it to say."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank == "0":
        print(line, file=sys.stderr)
    elif everywhere:
        time.sleep(FIRST_SPEAKS)
    else:
        print(f"rank {rank}: {line}", file=sys.stderr)


def user_line(error: Exception) -> str | None:
    """The line to show for a mistake or a broken disk; None for a bug."""
    if isinstance(error, OSError):
        return _os_line(error)
    for room, name in (
        ("bd3_megatron.config", "ConfigError"),
        ("data_prep.errors", "DataError"),
        ("slurm.client", "SlurmError"),
    ):
        kind = getattr(sys.modules.get(room), name, None)  # a room not imported has raised nothing
        if kind is not None and isinstance(error, kind):
            return " ".join(str(error).split())
    return None


def usage() -> str:
    """The text of ``bd3 --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: bd3 COMMAND [OPTIONS]",
            "",
            "Pretraining of block diffusion language models on Megatron-core.",
            "",
            *lines,
            "",
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
        print(f"{name}: unknown command; {hint}", file=sys.stderr)
        return USAGE_ERROR
    module, _, function = COMMANDS[name][0].partition(":")
    with signals.caught() if name == "pretrain" else contextlib.nullcontext():
        return getattr(importlib.import_module(module), function)(rest) or 0


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


def _os_line(error: OSError) -> str | None:
    """``PATH: cannot write: No space left on device``; None for what is not about a file or a disk."""
    if error.filename is None and error.errno not in WRITE_ERRORS:
        return None
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    reason = error.strerror or type(error).__name__
    if error.errno in WRITE_ERRORS:
        return f"{where}cannot write: {reason}"
    if isinstance(error, PermissionError):
        readable = os.access(error.filename, os.R_OK) or not os.path.exists(error.filename)
        return f"{where}cannot {'write' if readable else 'read'}: {reason}"
    # Making or opening something below a path that does not allow it: /proc/x, file/x.
    return f"{where}cannot read or write: {reason}"


if __name__ == "__main__":
    sys.exit(main())
