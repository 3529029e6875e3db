"""Stacks: where a thread is, whether it waits for other ranks, and the files that a hang leaves."""

from __future__ import annotations

import dis
import faulthandler
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TextIO

from bd3_common import PACKAGES, ROOT
from bd3_common.atomic import no_follow

# Files whose code waits for other ranks.
_COMMUNICATION = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/_functional_collectives.py",
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "deepspeed/comm/",
)
# Methods in C that wait for a started collective, or for the GPU that waits for one.
_WAITS = {"wait", "item", "tolist", "cpu", "synchronize"}
_OWN = tuple(f"{ROOT / package}/" for package in PACKAGES)
# The backward pass of a GPU runs in threads of its own.
_BACKWARD = "torch/autograd/graph.py"


def locate(thread: int) -> tuple[bool | None, str]:
    """Find out where a thread without progress is.

    Args:
        thread: identifier of the thread.

    Returns:
        True if it waits for other ranks (None: unknown), and the call at which it is.
    """
    frames = sys._current_frames()
    stack = _stack(frames.get(thread))
    if not stack:
        return None, ""
    if _waits(stack):
        return True, _place(stack)
    if stack[0].f_code.co_filename.endswith(_BACKWARD):
        others = [_stack(frame) for ident, frame in frames.items() if ident != thread]
        if any(_waits(other) for other in others if other[-1].f_code.co_name != "_bootstrap"):
            return True, _place(stack)
        return None, _place(stack)
    return False, _place(stack)


def write_stacks(path: Path, title: str) -> None:
    """Write the stacks of all threads of this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", opener=no_follow) as file:
        _head(file, title)
        faulthandler.dump_traceback(file, all_threads=True)


def write_state(path: Path, title: str, pid: int) -> None:
    """Write the kernel's state of a process that cannot write its stacks: stopped (T), waiting for a disk (D), ...

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", opener=no_follow) as file:
        _head(file, title)
        file.write("It gives no sign of life, so its stacks are not known.\n")
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()[:12]
        except (FileNotFoundError, ProcessLookupError):
            lines = ["The process has ended."]
        file.writelines(line + "\n" for line in lines)


def start_mark(pid: int | str = "self") -> str:
    """Boot and start time of a process of this machine, which tell it from a later one with the same number.

    Empty if the process has ended or the system has no /proc.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The command's name, in brackets, may hold anything; the start is the 20th field after it.
        return f"{boot} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""


def _head(file: TextIO, title: str) -> None:
    file.write(f"{title}, on {socket.gethostname()} at {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n\n")
    file.flush()


def _stack(frame: FrameType | None) -> list[FrameType]:
    """Frames from the innermost to the outermost."""
    stack = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return stack


def _waits(stack: list[FrameType]) -> bool:
    if any(part in frame.f_code.co_filename for frame in stack for part in _COMMUNICATION):
        return True
    return _calls(stack[0]) in _WAITS


def _calls(frame: FrameType) -> str:
    """Name of the method that a frame is calling, from its bytecode: reading the source file might hang, too."""
    names = [
        str(step.argval)
        for step in dis.get_instructions(frame.f_code)
        if step.offset <= frame.f_lasti and step.opname in ("LOAD_METHOD", "LOAD_ATTR")
    ]
    return names[-1] if names else ""


def _place(stack: list[FrameType]) -> str:
    """``all_reduce, called in global_loss (bd3_megatron/engine/stage.py:118)``"""
    inner = stack[0]
    if inner.f_code.co_name == "wrapper" and len(stack) > 1:  # of torch's logger
        inner = stack[1]
    own = next((frame for frame in stack if frame.f_code.co_filename.startswith(_OWN)), inner)
    name = own.f_code.co_filename.removeprefix(f"{ROOT}/")
    short = f"{name if own is not inner or name[:1] != '/' else '/'.join(name.split('/')[-3:])}:{own.f_lineno}"
    where = f"{own.f_code.co_name} ({short})"
    return where if own is inner else f"{inner.f_code.co_name}, called in {where}"
