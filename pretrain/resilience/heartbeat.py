"""Heartbeat writer and monitor: rank 0's small file in the run folder, for processes outside of the job.

The ranks watch each other (:mod:`pretrain.resilience.watchdog`). The file shows the supervisor that all of them, or the
only one, have stopped, and `bd3 status` the phase of a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from bd3_common import schema
from bd3_common.atomic import write_text
from bd3_common.errors import ConfigError, UserError
from bd3_common.schema import Count, Record
from pretrain.run_folder.identity import Identity, read_identity
from pretrain.run_folder.layout import HEARTBEAT

_LONGEST = 15.0  # seconds between beats
_IN_FILE = {"may_take_long": "patient"}  # names in the file where they differ from the fields


class Heartbeat(NamedTuple):
    """Contents of the file.

    Attributes:
        start: name of the writing process's start; differs between processes.
        beat: grows while that process runs.
        progress: grows while its main thread makes progress.
        phase: phase of the main thread, such as ``in step 12``.
        may_take_long: no progress is expected in this phase.
        left: the process has ended in good order.
        timeout: seconds without progress after which the job hangs.
    """

    start: str
    beat: int
    progress: int
    phase: str
    may_take_long: bool
    left: bool
    timeout: float

    def encode(self) -> str:
        """The file's text."""
        return json.dumps({_IN_FILE.get(name, name): value for name, value in self._asdict().items()})

    @staticmethod
    def decode(text: str | bytes) -> Heartbeat:
        """Inverse of :meth:`encode`.

        Raises:
            UserError: not such a text.
        """
        found: dict[str, Any] = schema.parse(text, _Beat, HEARTBEAT).model_dump()
        fields = {name: field for field, name in _IN_FILE.items()}
        return Heartbeat(**{fields.get(name, name): value for name, value in found.items()})


class _Beat(Record):
    """The file's JSON; see :class:`Heartbeat`."""

    start: str
    beat: Count
    progress: Count
    phase: str
    patient: bool
    left: bool
    timeout: float = Field(gt=0, le=1e9)


class HeartbeatWriter:
    """A thread that writes the file at every beat, from :meth:`start` to :meth:`stop`.

    Args:
        run: the run folder. It need not exist: a run that is refused writes nothing into it.
        timeout: seconds without progress after which the job hangs.
        state: returns progress, phase and ``may_take_long`` of the main thread.
        stalled: called once when the main thread has made no progress for ``timeout`` seconds.
    """

    def __init__(
        self, run: Path, timeout: float, state: Callable[[], tuple[int, str, bool]], stalled: Callable[[], None]
    ):
        self._run, self._timeout, self._state, self._stalled = run, timeout, state, stalled
        self._name = f"{time.time():.3f} {os.getpid()}"
        self._interval = min(_LONGEST, timeout / 10)
        self._identity: Identity | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread. It writes as long as the folder is that of the same run."""
        self._identity = self._read_identity()
        self._thread.start()

    def stop(self) -> None:
        """Write a last beat with ``left``: the process ends in good order, or the watchdog reports how it ends."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _beat(self) -> None:
        number, before, since = 0, -1, time.monotonic()
        leaving = False
        while not leaving:
            leaving = self._stop.wait(self._interval if number else 0)
            number += 1
            progress, phase, may_take_long = self._state()
            if progress != before or may_take_long:
                before, since = progress, time.monotonic()
            elif time.monotonic() - since > self._timeout:
                since = float("inf")
                self._stalled()
            self._write(Heartbeat(self._name, number, progress, phase, may_take_long, leaving, self._timeout))

    def _write(self, beat: Heartbeat) -> None:
        if self._read_identity() == self._identity:
            with contextlib.suppress(OSError):  # nothing depends on it, and it is soon written again
                write_text(self._run / HEARTBEAT, beat.encode(), durable=False)

    def _read_identity(self) -> Identity | None:
        with contextlib.suppress(ConfigError, OSError):
            return read_identity(self._run)
        return None


def read(run: Path) -> Heartbeat | None:
    """The newest heartbeat; None if there is no readable one."""
    try:
        return Heartbeat.decode(schema.read_bytes(run / HEARTBEAT, max_bytes=1 << 16))
    except (OSError, UserError):
        return None


class HeartbeatMonitor:
    """Watches the file for a process that stopped, by the clock of the monitor.

    Args:
        timeouts: number of timeouts without a beat, or without progress, after which the process counts as stopped.
    """

    def __init__(self, run: Path, timeouts: float = 1.5):
        self._run, self._timeouts = run, timeouts
        self._last: Heartbeat | None = None
        self._old = read(run)  # of an earlier start
        self._beat_at = self._progress_at = 0.0

    def trouble(self, now: float) -> str | None:
        """The reason to end the job, or None. A process that has not begun to beat is in no trouble.

        Args:
            now: seconds of any clock that only grows.
        """
        beat = read(self._run)
        if beat is None or (self._old is not None and beat.start == self._old.start):
            return None
        last, self._last = self._last, beat
        if last is None or beat.start != last.start or beat.beat != last.beat:
            self._beat_at = now
        if last is None or beat.progress != last.progress or beat.may_take_long or beat.start != last.start:
            self._progress_at = now
        limit = self._timeouts * beat.timeout
        if beat.left:
            return None
        if now - self._beat_at > limit:
            return f"the first rank has given no sign of life for {now - self._beat_at:.0f} s {beat.phase}"
        if not beat.may_take_long and now - self._progress_at > limit:
            return f"the first rank has made no progress for {now - self._progress_at:.0f} s {beat.phase}"
        return None
