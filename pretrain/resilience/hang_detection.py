"""Who holds a job up: from what the ranks last said of themselves to the ranks to name. Nothing here waits or talks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class Report:
    """What a rank says of itself with every beat."""

    beat: int = 0
    """grows while the process runs"""
    progress: int = 0
    """grows while its main thread does"""
    phase: str = "at the start"
    """for messages: ``in step 12``"""
    patient: bool = True
    """in a phase that may take as long as it takes"""
    left: bool = False
    """has ended or is about to"""
    waiting: bool | None = None
    """whether a main thread that makes no progress waits for other ranks; None: it cannot be told, or was not asked"""
    place: str = ""
    """where that thread stands"""

    def encode(self) -> str:
        return json.dumps(astuple(self), separators=(",", ":"))

    @staticmethod
    def decode(text: str | bytes) -> Report:
        """The report; that of a rank which has not said anything for an empty text."""
        return Report(*json.loads(text)) if text else Report()


class Process(NamedTuple):
    """A rank's process; ``started`` tells it from a later one with the same ``pid``."""

    rank: int
    host: str
    pid: int
    started: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


class Seen(NamedTuple):
    """A rank as the observer sees it: its last report, and the seconds since its counters changed."""

    report: Report
    beat_age: float
    progress_age: float


@dataclass
class Observer:
    """Ages of all ranks' counters by the observer's own clock: the clocks of two machines are never compared."""

    now: float = 0.0
    last: dict[int, tuple[Report, float, float]] = field(default_factory=dict)

    def update(self, reports: Mapping[int, Report], seconds: float) -> dict[int, Seen]:
        """Take in what is known ``seconds`` after the last update; the ranks that have not left, by rank."""
        self.now += seconds
        for rank, report in reports.items():
            before, beat, progress = self.last.get(rank, (report, self.now, self.now))
            beat = self.now if report.beat != before.beat else beat
            # A patient rank moves as long as it lives.
            moved = report.progress != before.progress or (report.patient and report.beat != before.beat)
            self.last[rank] = report, beat, self.now if moved else progress
        return {
            rank: Seen(report, self.now - beat, self.now - progress)
            for rank, (report, beat, progress) in self.last.items()
            if not report.left
        }


@dataclass(frozen=True)
class Verdict:
    """The job has stalled for ``seconds``, and these ranks hold it up.

    Attributes:
        kind: ``silent``: their processes give no sign of life; ``busy``: their main threads do something else while
            the others wait for them; ``slow``: nobody waits, all are at work; ``mismatch``: all wait, for each other.
    """

    kind: Literal["silent", "busy", "slow", "mismatch"]
    ranks: tuple[int, ...]
    seconds: float


def judge(seen: Mapping[int, Seen], limit: float) -> Verdict | None:
    """Who holds the job up; None while nobody does.

    A rank is silent when it has given no sign of life for ``limit`` seconds, or for half of them in a job that has
    not moved at all for ``limit``. Otherwise the job hangs when no rank's main thread has moved for ``limit`` and none
    is in a patient phase: one that moves now and then is being waited for, or does not need the others.
    """
    stalled = bool(seen) and all(s.progress_age >= limit for s in seen.values())
    for age in (limit, limit / 2) if stalled else (limit,):
        silent = tuple(rank for rank, s in sorted(seen.items()) if s.beat_age >= age)
        if silent:
            return Verdict("silent", silent, max(seen[rank].beat_age for rank in silent))
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
        return Verdict("mismatch", ranks, seconds)
    # One that nobody waits for is not hung, only slower than the limit.
    return Verdict("slow" if len(busy) == len(ranks) > 1 else "busy", busy, seconds)


def message(
    verdict: Verdict,
    reports: Mapping[int, Report],
    processes: Sequence[Process],
    timeout_minutes: float,
    folder: str,
) -> str:
    """The line that says why the job ends.

    Args:
        reports: the last one of every rank.
        processes: those of the first ranks named; more are counted.
        folder: where the stacks are written.
    """
    more = len(verdict.ranks) - len(processes)
    who = ", ".join(map(str, processes)) + (f" and {more} more" if more else "")
    one = len(verdict.ranks) == 1
    # What a silent rank said last may be a beat old; those that wait for it know how far it must be.
    others = [rank for rank in reports if rank not in verdict.ranks] if verdict.kind == "silent" else []
    phases = {reports[rank].phase: reports[rank].progress for rank in others or verdict.ranks}
    when = max(phases, key=phases.get)
    why = f"for {verdict.seconds:.0f} s {when} (parallel.timeout_minutes={timeout_minutes:g}): the job ends"
    again = "start the job again to go on from its last checkpoint"
    if verdict.kind == "silent":
        return (
            f"{who} {'has' if one else 'have'} given no sign of life {why}; the others' stacks are in {folder}; {again}"
        )
    if verdict.kind == "busy":
        stacks = f"its stack is in {stack_file(folder, verdict.ranks[0])}" if one else f"their stacks are in {folder}"
        return f"{who} {'has' if one else 'have'} made no progress {why}; {stacks}; {again}"
    if verdict.kind == "slow":
        longer = "give parallel.timeout_minutes more if this takes so long"
        return f"no rank has made progress {why}; their stacks are in {folder}; {longer}; {again}"
    why = f"for {verdict.seconds:.0f} s (parallel.timeout_minutes={timeout_minutes:g}): the job ends"
    places = standings({rank: reports[rank] for rank in verdict.ranks})
    return f"all ranks have waited for each other {why}: {places}; their stacks are in {folder}; {again}"


def standings(reports: Mapping[int, Report], most: int = 8) -> str:
    """``ranks 0-2, 5: in step 12 at all_reduce; rank 3: ...``, at most so many kinds of places."""
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
    """The file for a rank's stacks."""
    return f"{folder}/rank-{rank:05d}.txt"
