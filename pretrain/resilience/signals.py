"""Stop signals: noted at once, acted on by all ranks at the same step boundary.

Slurm sends SIGUSR1 before the time limit (``--signal``) and SIGTERM for preemption, requeue and cancel; a person sends
SIGINT. The first one is noted. A second one ends the process at once, wherever its main thread is: Python calls
handlers between two instructions of that thread only, which may wait in a collective, so a thread does the work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from bd3_common.exit_codes import STOPPED
from pretrain.resilience.stderr import write_line

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAME_SIGNAL = 1.0  # seconds: Slurm and srun may both forward one signal

_first = 0  # number of the first signal
_ignored = False
_catching = False


class Stopped(SystemExit):
    """The run has stopped because of a signal; ``code`` is the exit code."""


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Note :data:`SIGNALS` in this context. Enter it early: by default they end the process.

    In other threads than the main one this does nothing.
    """
    global _first, _ignored, _catching
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _first, _ignored, _catching = 0, False, True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_listen, args=(reading,), name="signals", daemon=True).start()
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _nothing) for number in SIGNALS}
    try:
        yield
    finally:
        _catching = False
        for number, handler in handlers.items() if not _ignored else ():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writing)


def received() -> int:
    """Number of the first signal that this rank got; 0 if none."""
    return _first


def ignore() -> None:
    """Ignore signals from now on: launchers send them to all ranks when the first one has ended."""
    global _ignored
    if threading.current_thread() is threading.main_thread():
        _ignored = True
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def name_of(number: int) -> str:
    """Name and reason of a signal: ``SIGUSR1 (the time limit is near)``."""
    reasons = {
        signal.SIGUSR1: " (the time limit is near)",
        signal.SIGTERM: " (preempted, requeued or cancelled)",
        signal.SIGINT: " (interrupted)",
    }
    return signal.Signals(number).name + reasons.get(signal.Signals(number), "")


def exit_code(number: int) -> int:
    """Exit code of a run that a signal stopped: 130 for Ctrl-C, as in a shell, else 75."""
    return 128 + number if number == signal.SIGINT else STOPPED


def _nothing(number: int, frame: object) -> None:
    """Handler that Python calls in the main thread; the listening thread has noted the signal before."""


def _forked() -> None:
    """Restore the default handlers in a process that a library forks from a rank (the project's own are spawned)."""
    if _catching:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forked)


def _listen(reading: int) -> None:
    global _first
    since = 0.0
    while numbers := os.read(reading, 64):
        for number in numbers:
            if number not in SIGNALS:
                continue
            now = time.monotonic()
            if not _first:
                _first, since = number, now
                _tell(f"{name_of(number)}: stops after this step with a checkpoint; the next signal ends it at once")
            elif now - since > _SAME_SIGNAL:
                name = signal.Signals(number).name
                _tell(f"{name}: the second signal, ends at once; the run goes on from its last checkpoint")
                os._exit(128 + number)
    os.close(reading)


def _tell(text: str) -> None:
    """Write a line on rank 0 only: all ranks get the signal."""
    if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0":
        write_line(text)
