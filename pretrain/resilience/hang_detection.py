"""Hang detection: pure functions of the ranks' heartbeats that find hung ranks and write the message about them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Literal, NamedTuple

from bd3_common import schema
from pretrain.run_folder import layout

_Fields = tuple[int, int, str, bool, bool, bool | None, str]


@dataclass(frozen=True)
class Report:
    """A rank's state, sent with every heartbeat."""

    beat: int = 0
    """grows while the process runs"""
    progress: int = 0
    """grows while its main thread makes progress"""
    phase: str = "at the start"
    """for messages: ``in step 12``"""
    may_take_long: bool = True
    """the phase may take long without progress"""
    left: bool = False
    """has ended or is about to"""
    waiting: bool | None = None
    """True if the main thread makes no progress because it waits for other ranks; None: unknown"""
    place: str = ""
    """function that the main thread is in"""

    def encode(self) -> str:
        """Text for the store."""
        return json.dumps(astuple(self), separators=(",", ":"))

    @staticmethod
    def decode(text: str | bytes) -> Report:
        """Inverse of :meth:`encode`; empty text means that the rank has not reported yet."""
        return Report(*schema.parse(text, _Fields, "a report in the rendezvous store")) if text else Report()


class Process(NamedTuple):
    """A rank's process; ``started`` distinguishes it from a later process with the same ``pid``."""

    rank: int
    host: str
    pid: int
    started: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


class Seen(NamedTuple):
    """A rank's last report, and the seconds since its counters changed."""

    report: Report
    beat_age: float
    progress_age: float


@dataclass
class Observer:
    """Ages of all ranks' counters, measured by the observer's clock alone: clocks of two machines may differ."""

    now: float = 0.0
    last: dict[int, tuple[Report, float, float]] = field(default_factory=dict)

    def update(self, reports: Mapping[int, Report], seconds: float) -> dict[int, Seen]:
        """Add reports read ``seconds`` after the last update; return the ranks that have not left, by rank."""
        self.now += seconds
        for rank, report in reports.items():
            before, beat, progress = self.last.get(rank, (report, self.now, self.now))
            beat = self.now if report.beat != before.beat else beat
            # In a phase that may take long, a sign of life counts as progress.
            moved = report.progress != before.progress or (report.may_take_long and report.beat != before.beat)
            self.last[rank] = report, beat, self.now if moved else progress
        return {
            rank: Seen(report, self.now - beat, self.now - progress)
            for rank, (report, beat, progress) in self.last.items()
            if not report.left
        }


@dataclass(frozen=True)
class Hang:
    """A job without progress for ``seconds``, and the ranks that cause it.

    Attributes:
        kind: ``silent``: their processes give no sign of life; ``busy``: their main threads do something else while
            the others wait for them; ``slow``: no rank waits, all are busy; ``mismatch``: all ranks wait for each
            other.
    """

    kind: Literal["silent", "busy", "slow", "mismatch"]
    ranks: tuple[int, ...]
    seconds: float


def find_hang(seen: Mapping[int, Seen], limit: float) -> Hang | None:
    """The hang of a job; None if it makes progress.

    A rank is silent after ``limit`` seconds without a sign of life, or after ``limit / 2`` if no rank has made progress
    for ``limit`` seconds. Otherwise the job hangs when no rank's main thread has made progress for ``limit`` seconds
    and none is in a phase that may take long: a rank that makes progress now and then is slow, not hung.
    """
    stalled = bool(seen) and all(s.progress_age >= limit for s in seen.values())
    for age in (limit, limit / 2) if stalled else (limit,):
        silent = tuple(rank for rank, s in sorted(seen.items()) if s.beat_age >= age)
        if silent:
            return Hang("silent", silent, max(seen[rank].beat_age for rank in silent))
    if not stalled:
        return None
    seconds = min(s.progress_age for s in seen.values())
    ranks = tuple(sorted(seen))
    busy = tuple(rank for rank in ranks if seen[rank].report.waiting is False)
    unclear = [rank for rank in ranks if seen[rank].report.waiting is None]
    if not busy and unclear:
        least = min(seen[rank].report.progress for rank in unclear)
        busy = tuple(rank for rank in unclear if seen[rank].report.progress == least)
    if not busy:
        return Hang("mismatch", ranks, seconds)
    # If no rank waits for another, the step takes longer than the limit.
    return Hang("slow" if len(busy) == len(ranks) > 1 else "busy", busy, seconds)


def message(
    hang: Hang,
    reports: Mapping[int, Report],
    processes: Sequence[Process],
    timeout_minutes: float,
    folder: str,
) -> str:
    """The line that names the hung ranks and the remedy.

    Args:
        reports: the last report of every rank.
        processes: processes of the first hung ranks; the message counts the others.
        folder: folder of the stacks.
    """
    more = len(hang.ranks) - len(processes)
    who = ", ".join(map(str, processes)) + (f" and {more} more" if more else "")
    one = len(hang.ranks) == 1
    # A silent rank's last report may be old; the ranks that wait for it know the present phase.
    others = [rank for rank in reports if rank not in hang.ranks] if hang.kind == "silent" else []
    phases = {reports[rank].phase: reports[rank].progress for rank in others or hang.ranks}
    when = max(phases, key=lambda phase: phases[phase])
    why = f"for {hang.seconds:.0f} s {when} (parallel.timeout_minutes={timeout_minutes:g}): the job ends"
    again = "start the job again to go on from its last checkpoint"
    if hang.kind == "silent":
        return (
            f"{who} {'has' if one else 'have'} given no sign of life {why}; the others' stacks are in {folder}; {again}"
        )
    if hang.kind == "busy":
        stacks = f"its stack is in {stack_file(folder, hang.ranks[0])}" if one else f"their stacks are in {folder}"
        return f"{who} {'has' if one else 'have'} made no progress {why}; {stacks}; {again}"
    if hang.kind == "slow":
        longer = "give parallel.timeout_minutes more if this takes so long"
        return f"no rank has made progress {why}; their stacks are in {folder}; {longer}; {again}"
    why = f"for {hang.seconds:.0f} s (parallel.timeout_minutes={timeout_minutes:g}): the job ends"
    places = standings({rank: reports[rank] for rank in hang.ranks})
    return f"all ranks have waited for each other {why}: {places}; their stacks are in {folder}; {again}"


def standings(reports: Mapping[int, Report], most: int = 8) -> str:
    """Ranks grouped by phase and place: ``ranks 0-2, 5 in step 12 at all_reduce; rank 3 ...``, ``most`` groups."""
    groups: dict[tuple[str, str], list[int]] = {}
    for rank, report in sorted(reports.items()):
        groups.setdefault((report.phase, report.place), []).append(rank)
    texts = [
        f"{'ranks' if len(ranks) > 1 else 'rank'} {spans(ranks)} {phase}{f' at {place}' if place else ''}"
        for (phase, place), ranks in groups.items()
    ]
    return "; ".join(texts[:most]) + (f"; {len(texts) - most} more places" if len(texts) > most else "")


def spans(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5] -> "0-2, 5"``, for ascending numbers."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in found)


def stack_file(folder: str, rank: int) -> str:
    """Path of a rank's stacks."""
    return f"{folder}/{layout.stack_name(rank)}"
