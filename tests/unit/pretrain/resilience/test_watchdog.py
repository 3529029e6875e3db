"""Hang detection: hung ranks, the message about them, and where a thread is."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.distributed.ranks import Ranks
from pretrain.resilience.hang_detection import (
    Hang,
    Observer,
    Process,
    Report,
    Seen,
    find_hang,
    message,
    spans,
    standings,
)
from pretrain.resilience.stacks import locate, start_mark, write_stacks, write_state
from pretrain.resilience.watchdog import Watchdog
from tests.polling import until

LIMIT = 10.0
AT_WORK = Report(5, 5, "in step 3", may_take_long=False)


def seen(beat_age: float = 0.1, progress_age: float = 12.0, **changes) -> Seen:
    return Seen(replace(AT_WORK, **changes), beat_age, progress_age)


WAITING = seen(waiting=True, place="all_reduce")
BUSY = seen(waiting=False, place="rows")

# ---- hung ranks ----


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([WAITING, seen(progress_age=9)], None),  # the job moves
        ([WAITING, BUSY, WAITING], Hang("busy", (1,), 12)),
        ([BUSY, WAITING, BUSY], Hang("busy", (0, 2), 12)),
        ([WAITING, seen(progress_age=0, may_take_long=True)], None),
        ([WAITING, WAITING], Hang("mismatch", (0, 1), 12)),
        ([BUSY, BUSY], Hang("slow", (0, 1), 12)),
        ([BUSY], Hang("busy", (0,), 12)),  # the last that has not left
        ([WAITING, seen(waiting=None, progress=4), seen(waiting=None)], Hang("busy", (1,), 12)),
        ([WAITING, seen(11, 11)], Hang("silent", (1,), 11)),
        ([seen(progress_age=1), seen(11, 11)], Hang("silent", (1,), 11)),
        ([seen(progress_age=0, may_take_long=True), seen(11, 11, may_take_long=True)], Hang("silent", (1,), 11)),
        # A stopped process was last heard of a beat after the others last moved.
        ([WAITING, seen(9.5, 10.2)], Hang("silent", (1,), 9.5)),
        ([seen(9.9, 9.9), seen(9.9, 9.9)], None),
        ([], None),
    ],
)
def test_hang(ranks, expected):
    assert find_hang(dict(enumerate(ranks)), LIMIT) == expected


ages = st.floats(0, 30)
anything = st.builds(
    Seen,
    st.builds(
        Report,
        beat=st.integers(0, 9),
        progress=st.integers(0, 9),
        may_take_long=st.booleans(),
        waiting=st.sampled_from([None, True, False]),
    ),
    ages,
    ages,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.integers(0, 40), anything, max_size=12))
def test_a_hang_names_the_ranks_that_cause_it(ranks):
    hang = find_hang(ranks, LIMIT)
    moving = [rank for rank, s in ranks.items() if s.progress_age < LIMIT]
    lost = [rank for rank, s in ranks.items() if s.beat_age >= LIMIT]
    if hang is None:
        assert not lost
        assert moving or not ranks
        return
    assert hang.ranks
    assert list(hang.ranks) == sorted(set(hang.ranks) & set(ranks))
    assert hang.seconds >= LIMIT / 2
    if hang.kind == "silent":
        assert set(lost) <= set(hang.ranks)
        assert all(ranks[rank].beat_age >= LIMIT / 2 for rank in hang.ranks)
        assert lost or not moving
    else:
        assert not moving
        assert not any(ranks[rank].report.waiting for rank in hang.ranks) or hang.kind == "mismatch"


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.integers(0, 40), anything, max_size=12), st.integers(0, 40), st.floats(10, 30))
def test_a_silent_rank_is_named_whatever_the_others_do(ranks, rank, age):
    assert rank in find_hang(ranks | {rank: Seen(AT_WORK, age, age)}, LIMIT).ranks


# ---- ages ----


def test_ages_are_of_changes_that_the_observer_saw():
    observer = Observer()
    reports = [Report(beat, 1, "in step 1", may_take_long=False) for beat in (7, 8, 8, 8)]
    ages_ = [observer.update({0: report}, 2.0)[0][1:] for report in reports]
    assert ages_ == [(0, 0), (0, 2), (2, 4), (4, 6)]
    moved = replace(reports[-1], beat=9, progress=2)
    assert observer.update({0: moved}, 1.0)[0][1:] == (0, 0)


def test_ranks_in_a_long_phase_age_only_when_they_fall_silent():
    observer = Observer()
    for beat in range(5):
        found = observer.update({0: Report(beat, 1, may_take_long=True)}, 2.0)
    assert found[0][1:] == (0, 0)
    found = observer.update({0: Report(4, 1, may_take_long=True)}, 2.0)
    assert found[0][1:] == (2, 2)


def test_ranks_that_left_are_not_waited_for():
    observer = Observer()
    observer.update({0: AT_WORK, 1: AT_WORK}, 1.0)
    assert set(observer.update({0: AT_WORK, 1: replace(AT_WORK, left=True)}, 100.0)) == {0}


@given(st.builds(Report, st.integers(0), st.integers(0), st.text(), st.booleans(), st.booleans(), place=st.text()))
def test_reports_pass_through_the_store(report):
    assert Report.decode(report.encode().encode()) == report


def test_a_rank_that_has_not_reported_may_take_long():
    assert Report.decode(b"").may_take_long


# ---- the line ----


@pytest.mark.parametrize(
    ("hang", "line"),
    [
        (
            Hang("busy", (3,), 45.4),
            "rank 3 (host node2, pid 4713) has made no progress for 45 s in step 12 (parallel.timeout_minutes=1): "
            "the job ends; its stack is in R/hang/rank-00003.txt; "
            "start the job again to go on from its last checkpoint",
        ),
        (
            Hang("silent", (1, 3), 45.4),
            "rank 1 (host node2, pid 4711), rank 3 (host node2, pid 4713) have given no sign of life for 45 s in step "
            "13 (parallel.timeout_minutes=1): the job ends; the others' stacks are in R/hang; "
            "start the job again to go on from its last checkpoint",
        ),
        (
            Hang("slow", (0, 1, 2, 3), 45.4),
            "no rank has made progress for 45 s in step 13 (parallel.timeout_minutes=1): the job ends; their stacks "
            "are in R/hang; give parallel.timeout_minutes more if this takes so long; "
            "start the job again to go on from its last checkpoint",
        ),
        (
            Hang("mismatch", (0, 1, 2, 3), 45.4),
            "all ranks have waited for each other for 45 s (parallel.timeout_minutes=1): the job ends: "
            "ranks 0-2 in step 13 at f; rank 3 in step 12 at g; their stacks are in R/hang; "
            "start the job again to go on from its last checkpoint",
        ),
    ],
)
def test_line(hang, line):
    reports = {rank: replace(AT_WORK, progress=13, phase="in step 13", place="f") for rank in range(3)}
    reports[3] = replace(AT_WORK, progress=12, phase="in step 12", place="g")
    processes = [Process(rank, "node2", 4710 + rank) for rank in hang.ranks]
    assert message(hang, reports, processes, 1.0, "R/hang") == line


def test_a_line_stays_short():
    ranks = tuple(range(1000))
    reports = {rank: replace(AT_WORK, place=str(rank)) for rank in ranks}
    processes = [Process(rank, "node", rank) for rank in ranks[:4]]
    line = message(Hang("silent", ranks[:900], 60), reports, processes, 10, "hang")
    assert "rank 3 (host node, pid 3) and 896 more have given" in line
    assert "; 992 more places" in standings(reports)


@given(st.sets(st.integers(0, 60)))
def test_spans_name_every_number(numbers):
    found = [list(map(int, part.split("-"))) for part in spans(sorted(numbers)).split(", ") if part]
    assert [n for low, *high in found for n in range(low, (high or [low])[0] + 1)] == sorted(numbers)


# ---- where threads are ----


@pytest.fixture
def lock() -> Iterator[threading.Lock]:
    """A lock that nobody gets during the test."""
    lock = threading.Lock()
    with lock:
        yield lock


def is_located(function: Callable[[], object], waiting: bool, place: str) -> bool:
    """True once a thread that blocks in ``function`` is located there."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()

    def located() -> bool:
        found = locate(thread.ident)
        return found[0] is waiting and found[1].startswith(place)

    return until(located, what=lambda: f"{(waiting, place)}; it is {locate(thread.ident)}")


def test_a_thread_that_is_blocked_elsewhere_does_not_wait_for_others(lock):
    def rows():
        lock.acquire()
        lock.release()

    assert is_located(rows, False, "rows (tests/unit/pretrain/resilience/test_watchdog.py:")


def test_waiting_for_a_method_in_c_is_located_by_its_name(lock):
    def collective():
        handle = type("Handle", (), {"wait": lock.acquire})
        handle.wait()
        lock.release()

    assert is_located(collective, True, "collective")


def test_code_of_torch_distributed_waits(lock):
    scope = {"lock": lock}
    source = "def all_reduce():\n    lock.acquire()\n    lock.release()\n"
    exec(compile(source, "/x/torch/distributed/distributed_c10d.py", "exec"), scope)

    def mean_loss():
        scope["all_reduce"]()

    assert is_located(mean_loss, True, "all_reduce")


def test_a_thread_that_is_gone_cannot_be_told():
    assert locate(-1) == (None, "")


def test_stacks_are_written(tmp_path):
    path = tmp_path / "hang" / "rank-00003.txt"
    write_stacks(path, "rank 3")
    text = path.read_text()
    assert text.startswith("rank 3, on ")
    assert "test_stacks_are_written" in text


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_a_process_is_told_from_another_with_its_number(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        mark = start_mark(child.pid)
        assert mark
        assert mark == start_mark(child.pid)
        assert start_mark(os.getpid()) == start_mark() != mark
        write_state(tmp_path / "state.txt", "rank 1", child.pid)
        assert "State:" in (tmp_path / "state.txt").read_text()
    finally:
        child.kill()
        child.wait()
    assert start_mark(child.pid) == ""


# ---- alone ----


def test_a_world_of_one_has_no_watch(tmp_path):
    with Watchdog(Ranks(), 1.0, tmp_path) as watch:
        watch.tick("in step 1")
        assert not [t.name for t in threading.enumerate() if t.name.startswith(("watchdog", "heartbeat"))]
