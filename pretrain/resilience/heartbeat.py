"""The first rank's heartbeat, a small file in the run folder, for those outside of the job.

The ranks watch each other (:mod:`pretrain.resilience.watchdog`); who started them sees by this file whether all of
them, or the only one, have stopped, and anybody sees where a run is at the moment.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bd3_common.atomic import write_text
from pretrain.run_folder.layout import HEARTBEAT

_LONGEST = 15.0  # seconds between beats


class Beat(NamedTuple):
    """What the file says.

    Attributes:
        start: of another value for every process that writes the file.
        beat: grows while that process runs.
        progress: grows while its main thread does.
        phase: where that is, as in ``in step 12``.
        patient: this phase may take as long as it takes.
        left: the process has ended in good order.
        timeout: seconds without progress after which the job hangs.
    """

    start: str
    beat: int
    progress: int
    phase: str
    patient: bool
    left: bool
    timeout: float


class Heart:
    """A thread that writes the file at every beat, from :meth:`start` to :meth:`stop`.

    Args:
        run: the run folder. It need not be there yet: whoever is refused one writes nothing into it.
        state: progress, phase and patience of the main thread.
        stalled: called once when the main thread has made no progress for ``timeout`` seconds.
    """

    def __init__(
        self, run: Path, timeout: float, state: Callable[[], tuple[int, str, bool]], stalled: Callable[[], None]
    ):
        self._run, self._timeout, self._state, self._stalled = run, timeout, state, stalled
        self._name = f"{time.time():.3f} {os.getpid()}"
        self._interval = min(_LONGEST, timeout / 10)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The process ends in good order, or another thread says how it ends."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _beat(self) -> None:
        number, before, since = 0, -1, time.monotonic()
        leaving = False
        while not leaving:
            leaving = self._stop.wait(self._interval if number else 0)
            number += 1
            progress, phase, patient = self._state()
            if progress != before or patient:
                before, since = progress, time.monotonic()
            elif time.monotonic() - since > self._timeout:
                since = float("inf")
                self._stalled()
            self._write(Beat(self._name, number, progress, phase, patient, leaving, self._timeout))

    def _write(self, beat: Beat) -> None:
        with contextlib.suppress(OSError):  # nothing depends on it, and it is soon written again
            write_text(self._run / HEARTBEAT, json.dumps(beat._asdict()), durable=False)


def read(run: Path) -> Beat | None:
    """The newest beat; None where there is none to be read."""
    try:
        return Beat(**json.loads((run / HEARTBEAT).read_text()))
    except (OSError, ValueError, TypeError):
        return None


class Listener:
    """Whether a heart still beats, by the clock of the listener.

    Args:
        patience: how many timeouts without a beat, or without progress, are too many.
    """

    def __init__(self, run: Path, patience: float = 1.5):
        self._run, self._patience = run, patience
        self._last, self._old = None, read(run)
        self._beat_at = self._progress_at = 0.0

    def trouble(self, now: float) -> str | None:
        """What is wrong ``now`` (seconds of any clock that only grows); None as long as nothing is, or nothing is
        known: of a process that has not begun to beat."""
        beat = read(self._run)
        if beat is None or (self._old is not None and beat.start == self._old.start):
            return None
        last, self._last = self._last, beat
        if last is None or beat.start != last.start or beat.beat != last.beat:
            self._beat_at = now
        if last is None or beat.progress != last.progress or beat.patient or beat.start != last.start:
            self._progress_at = now
        limit = self._patience * beat.timeout
        if beat.left:
            return None
        if now - self._beat_at > limit:
            return f"the first rank has given no sign of life for {now - self._beat_at:.0f} s {beat.phase}"
        if not beat.patient and now - self._progress_at > limit:
            return f"the first rank has made no progress for {now - self._progress_at:.0f} s {beat.phase}"
        return None
