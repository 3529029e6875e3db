"""Heartbeat writer and monitor."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pretrain.resilience.heartbeat import Heartbeat, HeartbeatMonitor, HeartbeatWriter, read
from pretrain.run_folder import events
from pretrain.run_folder.layout import HEARTBEAT
from tests.polling import until
from tests.unit.pretrain.resilience.test_supervisor import run_attempt


def write(run: Path, **fields: object) -> None:
    beat = Heartbeat("a", 1, 1, "in step 1", False, False, 10.0)
    (run / HEARTBEAT).write_text(beat._replace(**fields).encode())


def test_the_writer_writes_until_it_is_stopped(tmp_path):
    state, stalled = [1, "in step 1", False], threading.Event()
    writer = HeartbeatWriter(tmp_path, 0.3, lambda: tuple(state), stalled.set)
    writer.start()
    assert stalled.wait(60)
    first = read(tmp_path)
    state[:] = [2, "in step 2", True]
    until(lambda: read(tmp_path).progress == 2)
    writer.stop()
    last = read(tmp_path)
    assert (first.progress, first.phase, first.left) == (1, "in step 1", False)
    assert (last.progress, last.phase, last.may_take_long, last.left) == (2, "in step 2", True, True)
    assert last.beat > first.beat
    assert [path.name for path in tmp_path.iterdir()] == [HEARTBEAT]


def test_the_monitor_reports_what_is_wrong_and_when(tmp_path):
    monitor = HeartbeatMonitor(tmp_path)
    assert monitor.trouble(0) is None  # nothing there
    for now in range(0, 100, 5):  # beats, and gets on
        write(tmp_path, beat=now, progress=now)
        assert monitor.trouble(now) is None
    for now in range(100, 200, 5):  # beats, in a phase that takes its time
        write(tmp_path, beat=now, progress=100, may_take_long=True)
        assert monitor.trouble(now) is None
    for now in range(200, 215, 5):
        write(tmp_path, beat=now, progress=100)
        assert monitor.trouble(now) is None
    write(tmp_path, beat=300, progress=100, phase="in step 7")
    assert monitor.trouble(216) == "the first rank has made no progress for 21 s in step 7"
    write(tmp_path, beat=400, progress=101)
    assert monitor.trouble(220) is None
    assert monitor.trouble(235) is None
    assert monitor.trouble(236) == "the first rank has given no sign of life for 16 s in step 1"
    write(tmp_path, beat=401, progress=101, left=True)
    assert monitor.trouble(1000) is None


def test_the_beats_of_an_earlier_start_say_nothing(tmp_path):
    write(tmp_path)
    monitor = HeartbeatMonitor(tmp_path)
    assert monitor.trouble(0) is None
    assert monitor.trouble(1000) is None
    write(tmp_path, start="b")
    assert monitor.trouble(1001) is None
    assert monitor.trouble(1017) is not None


@pytest.mark.parametrize("stubborn", [False, True])
def test_the_supervisor_ends_a_command_without_heartbeat(tmp_path, stubborn):
    run = tmp_path / "run"
    text = Heartbeat("x", 1, 1, "in step 5", False, False, 1.0).encode()
    program = f"import pathlib, time; pathlib.Path({str(run / HEARTBEAT)!r}).write_text({text!r}); time.sleep(1000)"
    if stubborn:
        program = "import signal; signal.signal(signal.SIGTERM, lambda *_: exit(75)); " + program
    done = run_attempt(run, "--restarts", "0", program=program)
    assert done.returncode == (75 if stubborn else 143)
    (ended,) = [event for event in events.read(run) if event["event"] == "ended"]
    assert ended["kind"] == "hang"
    assert "given no sign of life for" in ended["cause"]
