"""Progress of a long step: MB/s of text and the remaining time."""

from __future__ import annotations

import time
from collections.abc import Callable

REPORT_SECONDS = 2.0
GUESS = 1.0  # stored bytes per byte of text, until the first part is finished

Report = Callable[[str], None]


class Progress:
    """Reports at most every ``REPORT_SECONDS``, and once at the end.

    The total is in stored bytes, progress in bytes of text; finished parts give the ratio.

    Args:
        report: called with one line of text.
        verb: name of the step, for example ``tokenized``.
        weight: stored bytes of all parts.
    """

    def __init__(self, report: Report, verb: str, weight: int):
        self.report, self.verb, self.weight = report, verb, weight
        self.began = self.told = time.monotonic()
        self.bytes = self.finished_weight = self.finished_bytes = 0

    def tick(self, total: int) -> None:
        """Set the bytes of text done, including those of unfinished parts."""
        self.bytes = max(self.bytes, total)
        if time.monotonic() - self.told >= REPORT_SECONDS:
            self.line()

    def done(self, weight: int, size: int) -> None:
        """Record a finished part of ``weight`` stored bytes and ``size`` bytes of text."""
        self.finished_weight += weight
        self.finished_bytes += size
        self.tick(self.finished_bytes)

    def line(self) -> None:
        self.told = time.monotonic()
        seconds = max(self.told - self.began, 1e-9)
        text = f"{self.verb}: {self.bytes / 1e6:.1f} MB, {self.bytes / seconds / 1e6:.1f} MB/s"
        left = self.seconds_left(seconds)
        self.report(text if left is None else f"{text}, about {duration(left)} left")

    def seconds_left(self, seconds: float) -> float | None:
        """Estimate after ``seconds``; None if all is done or nothing is known yet."""
        if self.finished_weight >= self.weight or not self.bytes:
            return None
        ratio = self.finished_weight / self.finished_bytes if self.finished_bytes else GUESS
        done = min(self.finished_weight + (self.bytes - self.finished_bytes) * ratio, 0.99 * self.weight)
        return seconds * (self.weight - done) / done if done > 0 else None


def duration(seconds: float) -> str:
    """``"45 s"``, ``"12 min"``, ``"3 h 20 min"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
