"""Signals that ask a run to stop: noted at once, and acted on by all ranks together at a step boundary.

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

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_TOGETHER = 1.0  # seconds: Slurm and srun may both pass on what is one signal

_asked = 0  # the first signal
_ignored = False
_catching = False


class Stopped(SystemExit):
    """The run was asked to stop and has stopped; ``code`` is the exit code."""


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Note :data:`SIGNALS` in this context; to be entered early, because their default is to end the process.

    Does nothing in another thread than the main one.
    """
    global _asked, _ignored, _catching
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked, _ignored, _catching = 0, False, True
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


def asked() -> int:
    """The signal that asks this rank to stop; 0 if none has come."""
    return _asked


def ignore() -> None:
    """The rest of this process has only to end: launchers send signals to all ranks when the first one has."""
    global _ignored
    if threading.current_thread() is threading.main_thread():
        _ignored = True
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def name_of(number: int) -> str:
    """``SIGUSR1 (the time limit is near)``"""
    reasons = {
        signal.SIGUSR1: " (the time limit is near)",
        signal.SIGTERM: " (preempted, requeued or cancelled)",
        signal.SIGINT: " (interrupted)",
    }
    return signal.Signals(number).name + reasons.get(signal.Signals(number), "")


def exit_code(number: int) -> int:
    """Of a run that has stopped because of this signal: shells know 130 as Ctrl-C."""
    return 128 + number if number == signal.SIGINT else STOPPED


def _nothing(number: int, frame: object) -> None:
    """What Python calls in the main thread; the thread has been told before."""


def _forked() -> None:
    """A process forked from a rank (by a library; the project's own are spawned) is no rank: signals end it."""
    if _catching:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forked)


def _listen(reading: int) -> None:
    global _asked
    since = 0.0
    while numbers := os.read(reading, 64):
        for number in numbers:
            if number not in SIGNALS:
                continue
            now = time.monotonic()
            if not _asked:
                _asked, since = number, now
                _say(f"{name_of(number)}: stops after this step with a checkpoint; the next signal ends it at once")
            elif now - since > _TOGETHER:
                name = signal.Signals(number).name
                _say(f"{name}: the second signal, ends at once; the run goes on from its last checkpoint")
                os._exit(128 + number)
    os.close(reading)


def _say(text: str) -> None:
    """On the first rank only: all get the signal."""
    if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0":
        os.write(2, f"{text}\n".encode())
